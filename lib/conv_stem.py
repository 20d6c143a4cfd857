"""EfficientNet-Lite0's first 15 blocks: the bundled model's ViT takes patches of their features, not pixels.

This is the hybrid of the ViT paper, which learns from far fewer pictures. The network (16 blocks) is Tan and
Le's of 2019 (https://arxiv.org/abs/1905.11946) with ReLU6 and without squeeze-and-excitation; its batch norms
are folded into the convolutions.
"""

import torch
from torch import Tensor, nn

STRIDE, WIDTH = 32, 192                                # (B, 3, S, S) -> (B, 192, S / 32, S / 32)
# of each stage: blocks, width, kernel, stride of the first block, expansion
STAGES = ((1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6),
          (4, 192, 5, 2, 6))


def conv(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that pads as TensorFlow does: at stride 2 more on the right and at the bottom."""
    left, right = (kernel - stride) // 2, (kernel - stride + 1) // 2
    if left == right:
        return nn.Sequential(nn.Conv2d(n_in, n_out, kernel, stride, left, groups=groups))
    return nn.Sequential(nn.ZeroPad2d((left, right, left, right)),
                         nn.Conv2d(n_in, n_out, kernel, stride, groups=groups))


class InvertedResidual(nn.Module):
    """To more channels, a filter for each of them, and back."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        n = n_in * expansion
        wider = [conv(n_in, n, 1), nn.ReLU6()] if expansion > 1 else []
        self.layers = nn.Sequential(*wider, conv(n, n, kernel, stride, groups=n), nn.ReLU6(),
                                    conv(n, n_out, 1))
        self.skip = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.skip else self.layers(x)


class ConvStem(nn.Sequential):
    """Normalised images (B, 3, S, S) to features (B, 192, S / 32, S / 32)."""

    def __init__(self):
        layers, width = [conv(3, 32, 3, 2), nn.ReLU6()], 32
        for n_block, n_out, kernel, stride, expansion in STAGES:
            for i in range(n_block):
                layers.append(InvertedResidual(width, n_out, kernel, 1 if i else stride, expansion))
                width = n_out
        super().__init__(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.contiguous(memory_format=torch.channels_last))
