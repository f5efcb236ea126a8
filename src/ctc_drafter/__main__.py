"""`python -m ctc_drafter`, for launchers such as torchrun."""

from .cli import main

main()
