"""`python -m fedalign` is the `fedalign` command."""

from fedalign.cli.main import main

if __name__ == "__main__":
    main()
