"""To the Hugging Face Hub, through its own library: exactly the exported folder, private unless told otherwise."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from fedalign.errors import UserError
from fedalign.export.card import Made

LOGIN = "Log in with `hf auth login`, or set HF_TOKEN."


@dataclass(frozen=True)
class Push:
    """Where an exported folder goes."""

    repo: str  # OWNER/NAME
    public: bool = False
    overwrite: bool = False  # replace what the repository holds; its history keeps it

    def check(self) -> None:
        """Ask the Hub whether this can be done, before anything is exported.

        Raises:
            UserError: No token, no network, no such name, or there is a repository already.
        """
        if self.repo.count("/") != 1:
            raise UserError(f"--push {self.repo!r}: must be OWNER/NAME, as the Hub has it.")
        if get_token() is None:
            raise UserError(f"--push {self.repo!r}: there is no token. {LOGIN}")
        api = HfApi()
        with self._told():
            api.whoami()
            if not api.repo_exists(self.repo):
                return
            if not self.overwrite:
                raise UserError(
                    f"--push {self.repo!r}: is there already. Give another name; --overwrite makes it this model."
                )
            private = api.model_info(self.repo).private
            if not self.public and not private:
                raise UserError(f"--push {self.repo!r}: is public. Add --public if all may read this model.")
            if self.public and private:  # a push changes what it holds, and never who may read it
                raise UserError(
                    f"--push {self.repo!r}: is private. Leave --public out, or make it public in its settings on the "
                    "Hub first."
                )

    def send(self, folder: Path, made: Made) -> str:
        """Make the repository hold what `folder` holds, and nothing else; returns its address.

        Raises:
            UserError: The Hub refused, the network failed, or others could not load it.
        """
        if made.form == "adapter" and made.local_base:
            raise UserError(
                f"--push {self.repo!r}: not pushed, {folder} alone is written. The adapter names its base by a folder "
                "of this machine: name its Hub id with --base, or add --merge."
            )
        api = HfApi()
        private = "" if self.public else "--private "  # which the Hub's own command is not by itself
        alone = f"hf upload {private}{self.repo} {shlex.quote(str(folder))} ."
        with self._told(f" The export itself is whole: {folder}. Push it alone with: {alone}"):
            address = api.create_repo(self.repo, private=not self.public, exist_ok=self.overwrite)
            api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message="Model exported by fedalign-moe",
                delete_patterns="*" if self.overwrite else None,
            )
        return str(address)

    @contextmanager
    def _told(self, kept: str = "") -> Iterator[None]:
        """The objection of the Hub or the network, in one line."""
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            advice = f" {LOGIN}" if status == httpx.codes.UNAUTHORIZED else ""
            reason = " ".join((error.server_message or str(error).strip().splitlines()[0]).split()).rstrip(".")
            raise UserError(f"--push {self.repo!r}: the Hub refused ({status}): {reason}.{advice}{kept}") from None
        except ValueError as error:  # a name that the Hub does not allow, or an address that its library cannot read
            raise UserError(f"--push {self.repo!r}: {' '.join(str(error).split())}{kept}") from None
        except (OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
            raise UserError(f"--push {self.repo!r}: the Hub cannot be reached ({error}).{kept}") from None
