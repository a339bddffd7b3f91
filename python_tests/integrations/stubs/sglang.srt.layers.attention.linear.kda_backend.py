"""Who serves what."""

from sglang.srt.layers.attention.linear.kernels.kda_triton import TritonKDAKernel


class OtherKernel:
    pass


class KDAKernelDispatcher:
    def __init__(self, decode_backend, prefill_backend, verify_backend):
        backends = {"triton": TritonKDAKernel, "other": OtherKernel}
        self.decode_kernel = backends[decode_backend]()
        self.extend_kernel = backends[prefill_backend]()
        self.verify_kernel = backends[verify_backend]()
