"""States on the way that a prefix cache keeps."""

from dataclasses import dataclass

import torch


@dataclass
class MambaPrefillCheckpointMetadata:
    checkpoint_offsets: torch.Tensor
    state_indices: torch.Tensor
    offsets: list | None = None


class MambaPrefillCheckpointExporter:
    def export(self, checkpoint, *, raw_qkv, conv_state, cu_seqlens, recurrent_checkpoint=None):
        for n, (offset, slot) in enumerate(zip(checkpoint.offsets, checkpoint.state_indices.tolist(), strict=True)):
            if offset and slot:
                end = int(cu_seqlens[n]) + offset
                conv_state[slot, :, :3] = raw_qkv[end - 3 : end].T
