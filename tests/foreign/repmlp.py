"""RepMLPNet's block as its authors wrote it: global, channel and local perceptrons."""

import torch.nn.functional as F
from torch import nn


def conv_bn(c1, c2, k, padding=0, groups=1):
    branch = nn.Sequential()
    branch.add_module("conv", nn.Conv2d(c1, c2, k, padding=padding, groups=groups, bias=False))
    branch.add_module("bn", nn.BatchNorm2d(c2))
    return branch


class RepMLPBlock(nn.Module):
    def __init__(self, in_channels, out_channels, h, w, reparam_conv_k=(1, 3), num_sharesets=1):
        super().__init__()
        self.C, self.O, self.S, self.h, self.w = in_channels, out_channels, num_sharesets, h, w
        self.down, self.up = nn.Conv2d(in_channels, 4, 1), nn.Conv2d(4, in_channels, 1)
        numbers = h * w * num_sharesets
        self.fc3 = nn.Conv2d(numbers, numbers, 1, 1, 0, bias=False, groups=num_sharesets)
        self.fc3_bn = nn.BatchNorm2d(num_sharesets)
        self.reparam_conv_k = reparam_conv_k
        for k in reparam_conv_k:
            branch = conv_bn(num_sharesets, num_sharesets, k, padding=k // 2, groups=num_sharesets)
            self.__setattr__(f"repconv{k}", branch)

    def partition(self, x, h_parts, w_parts):
        x = x.reshape(-1, self.C, h_parts, self.h, w_parts, self.w)
        return x.permute(0, 2, 4, 1, 3, 5)

    def partition_affine(self, x, h_parts, w_parts):
        fc_inputs = x.reshape(-1, self.S * self.h * self.w, 1, 1)
        out = self.fc3(fc_inputs)
        out = out.reshape(-1, self.S, self.h, self.w)
        out = self.fc3_bn(out)
        return out.reshape(-1, h_parts, w_parts, self.S, self.h, self.w)

    def forward(self, inputs):
        gates = self.up(F.relu(self.down(F.adaptive_avg_pool2d(inputs, output_size=(1, 1))))).sigmoid()
        origin_shape = inputs.size()
        h_parts, w_parts = origin_shape[2] // self.h, origin_shape[3] // self.w
        partitions = self.partition(inputs, h_parts, w_parts)
        fc3_out = self.partition_affine(partitions, h_parts, w_parts)
        if self.reparam_conv_k is not None:
            conv_inputs = partitions.reshape(-1, self.S, self.h, self.w)
            conv_out = 0
            for k in self.reparam_conv_k:
                conv_out += self.__getattr__(f"repconv{k}")(conv_inputs)
            conv_out = conv_out.reshape(-1, h_parts, w_parts, self.S, self.h, self.w)
            fc3_out += conv_out
        fc3_out = fc3_out.permute(0, 3, 1, 4, 2, 5)
        out = fc3_out.reshape(*origin_shape)
        return out * gates
