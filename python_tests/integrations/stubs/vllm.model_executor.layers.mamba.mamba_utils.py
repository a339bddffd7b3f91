"""The layout of convolution states: [slots, inputs, channels]."""


def is_conv_state_dim_first():
    return False
