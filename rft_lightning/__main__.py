"""`python -m rft_lightning` is the command `rft`."""

from rft_lightning.cli import main

if __name__ == "__main__":
    main()
