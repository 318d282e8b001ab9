"""Optimizers that torch lacks, or whose update in torch is thousands of kernels or waits.

One file for each. `pipeline.config.ds_config.OPTIMIZERS` lists them beside torch's.
"""
