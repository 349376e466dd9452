"""A site's processes as one command: the trainer that keeps the model loaded, Flower's SuperNode, and its apps."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

from fedalign.client.open import open_site
from fedalign.config.site import SiteFolder
from fedalign.config.toml import read_config
from fedalign.errors import UserError
from fedalign.federation.flower.offspring import MARK, end_all
from fedalign.federation.flower.programs import check_plaintext, environment, free_port, mended, require_flower
from fedalign.federation.flower.ready import ready
from fedalign.federation.flower.warm import serve
from fedalign.federation.service import Service, log_to_stderr
from fedalign.federation.site import service_of
from fedalign.files import LOCK, locked
from fedalign.moe.load import quiet


def serve_site(folder: SiteFolder, *, supernode: bool, insecure_anywhere: bool, tell: Callable[[str], None]) -> None:
    """Keep a site ready for rounds until it is interrupted; whatever was started is ended.

    Args:
        folder: the site.
        supernode: also start Flower's SuperNode; without it, the trainer alone.
        insecure_anywhere: the user accepts plaintext over a network.
        tell: says what a person should know.

    Raises:
        UserError: It is served already, or the SuperNode cannot be started or has ended.
    """
    log_to_stderr()
    quiet()
    with locked(folder.path / LOCK, "a trainer"), _terminated_as_interrupted():  # two would load the model twice
        tell(f"{folder.config.name}, [consent]: {folder.config.consent.told}")
        if supernode:
            link = folder.config.coordinator
            require_flower("flower")
            certificates = link.root_certificates and folder.resolve(link.root_certificates)
            check_plaintext(link.superlink, certificates, insecure_anywhere)
            with _supernode(folder) as ended:
                _serve(folder, lambda: tell(f"{folder.config.name} is ready for {link.superlink}; Ctrl-C ends it"))
                if ended.is_set():
                    raise UserError(f"site {folder.config.name!r}: flower-supernode has ended; see its messages above.")
        else:
            _serve(folder, lambda: tell(f"the trainer of {folder.config.name} is ready; Ctrl-C ends it"))


def _serve(folder: SiteFolder, ready: Callable[[], None]) -> None:
    def service(config: str, run: str) -> Service:
        settings, now = read_config(config), SiteFolder.load(folder.path)
        return service_of(now, settings, run, lambda: open_site(now, settings, run))

    with contextlib.suppress(KeyboardInterrupt):
        serve(folder, service, ready)


@contextlib.contextmanager
def _supernode(folder: SiteFolder) -> Iterator[threading.Event]:
    """Flower's SuperNode beside this process; the event is set, and this process interrupted, if it ends first."""
    home = folder.path / "flower"
    home.mkdir(exist_ok=True)
    mark = str(home)
    end_all(mark)  # what a trainer that was killed has left
    ended, closing = threading.Event(), threading.Event()
    with ready({**environment(home), MARK: mark}) as (surroundings, descriptor):
        process = subprocess.Popen(
            mended(folder.supernode_command(free_port())),
            env=surroundings,
            pass_fds=[descriptor],
            start_new_session=True,
        )

        def watch() -> None:
            process.wait()
            if not closing.is_set():
                ended.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes a waiting socket

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield ended
        finally:
            closing.set()
            end_all(mark)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as a service manager sends it, ends this process in good order."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
