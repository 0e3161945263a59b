"""Time MoE layers on one GPU: ours beside the floor of the hardware and the kernels that engines use."""
