"""The repair of running statistics, in any PyTorch program.

In comes a model with BatchNorm layers, and data. Out come layers whose running statistics are the exact ones of that
data, with a report of before and after and the way back (``recalibration``), or the answer to which layer's running
statistics cost how much of the loss (``attribution``). Both run the model in ``passes`` that leave it as it was.
"""
