"""SPAN's block as its authors wrote it: in eval mode the kernels are composed and assigned in every forward."""

import torch
import torch.nn.functional as F
from torch import nn


class Conv3XC(nn.Module):
    def __init__(self, c_in, c_out, gain=2, s=1, relu=False):
        super().__init__()
        self.weight_concat = self.bias_concat = None
        self.has_relu = relu
        self.sk = nn.Conv2d(c_in, c_out, 1, stride=s)
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, c_in * gain, 1),
            nn.Conv2d(c_in * gain, c_out * gain, 3, stride=s),
            nn.Conv2d(c_out * gain, c_out, 1),
        )
        self.eval_conv = nn.Conv2d(c_in, c_out, 3, padding=1, stride=s)
        self.eval_conv.weight.requires_grad = False
        self.eval_conv.bias.requires_grad = False
        self.update_params()

    def update_params(self):
        (w1, b1), (w2, b2), (w3, b3) = (
            (conv.weight.data.clone().detach(), conv.bias.data.clone().detach()) for conv in self.conv
        )
        w = F.conv2d(w1.flip(2, 3).permute(1, 0, 2, 3), w2, padding=2).flip(2, 3).permute(1, 0, 2, 3)
        b = (w2 * b1.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b2
        w = F.conv2d(w.flip(2, 3).permute(1, 0, 2, 3), w3).flip(2, 3).permute(1, 0, 2, 3)
        b = (w3 * b.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b3
        self.weight_concat = w + F.pad(self.sk.weight.data.clone().detach(), [1, 1, 1, 1])
        self.bias_concat = b + self.sk.bias.data.clone().detach()
        self.eval_conv.weight.data = self.weight_concat
        self.eval_conv.bias.data = self.bias_concat

    def forward(self, x):
        if self.training:
            out = self.conv(F.pad(x, (1, 1, 1, 1), "constant", 0)) + self.sk(x)
        else:
            self.update_params()
            out = self.eval_conv(x)
        return F.leaky_relu(out, negative_slope=0.05) if self.has_relu else out


class SPAN(nn.Module):
    """Two blocks, an attention without parameters, and pixels shuffled; the image's mean is kept at every call."""

    def __init__(self, width=8):
        super().__init__()
        self.mean = torch.Tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
        self.head, self.body = Conv3XC(3, width), Conv3XC(width, width, relu=True)
        self.tail = Conv3XC(width, 12)

    def forward(self, x):
        self.mean = self.mean.type_as(x)
        x = (x - self.mean) * 255.0
        y = self.head(x)
        z = self.body(y)
        return F.pixel_shuffle(self.tail((z + y) * (torch.sigmoid(z) - 0.5)), 2)
