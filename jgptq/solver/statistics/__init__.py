"""Sums over calibration tokens: the Hessian, and how far the quantized model has drifted from the float one."""
