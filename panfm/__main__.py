"""`python -m panfm`: the command `panfm`."""

from panfm.cli import main

if __name__ == "__main__":
    main(prog_name="panfm")
