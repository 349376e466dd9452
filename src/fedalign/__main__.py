"""`python -m fedalign` is the `fedalign` command."""

from fedalign.cli import main

if __name__ == "__main__":
    main()
