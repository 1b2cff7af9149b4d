"""`python -m predict_train`, and so `torchrun -m predict_train`."""

from .cli import main

main()
