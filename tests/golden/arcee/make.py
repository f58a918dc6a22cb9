"""Makes this folder's checkpoints: mergekit's arcee_fusion where float32 can tell the rows' divergences apart.

The formulas are those of mergekit's merge_methods/arcee_fusion.py (ArceeFusionMergeTask, DynamicThresholdFusion), in
float32 with PyTorch, on tensors of fewer than a million elements, of which nothing is sampled.
"""

import json
import os
import struct

import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))


def quantiles(tensor, q):
    ordered, _ = torch.sort(tensor.reshape(-1))
    return ordered[(torch.tensor(q) * (ordered.numel() - 1)).long()]


def fuse(base, model):
    p, q = F.softmax(model, dim=-1) + 1e-8, F.softmax(base, dim=-1) + 1e-8
    divergence = torch.sum(p * torch.log(p / q), dim=-1)
    importance = (model - base).abs() * divergence.unsqueeze(-1)
    first, median, third = quantiles(importance, [0.25, 0.5, 0.75])
    mask = (importance >= median + 1.5 * (third - first)).float()
    return base + (model - base) * mask


def save(name, tensors):
    header, data = {}, b""
    for key, tensor in sorted(tensors.items()):
        raw = b"".join(struct.pack("<f", x) for x in tensor.reshape(-1).tolist())
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(HERE, name + ".safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


torch.manual_seed(5)
shapes = {"matrix": [24, 32], "wide": [6, 96], "deep": [3, 4, 16], "vector": [64]}
base = {name: torch.randn(shape) for name, shape in shapes.items()}
model = {name: x + torch.randn(x.shape) * torch.rand(x.shape[:-1] + (1,)) for name, x in base.items()}
save("base", base)
save("model", model)
save("merged", {name: fuse(base[name], model[name]) for name in base})
