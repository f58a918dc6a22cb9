"""Writes the PyTorch checkpoints of this folder with Python's own pickle, without PyTorch.

The classes below stand in for PyTorch's and reduce as torch.save sees them (torch/_tensor.py, torch/nn/parameter.py,
torch/serialization.py); the archive is laid out as caffe2/serialize/inline_container.cc does it: members stored, data
at multiples of 64 bytes behind an "FB" field, sizes in data descriptors, a zip64 end record.
"""

import collections
import io
import json
import os
import pickle
import struct
import sys
import types
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))


def module(name):
    made = types.ModuleType(name)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, made)
    return made


torch = module("torch")
utils = module("torch._utils")
tensor_module = module("torch._tensor")
storage_module = module("torch.storage")
module("torch.nn")
parameter_module = module("torch.nn.parameter")


def put(where, value, name):
    value.__module__, value.__qualname__, value.__name__ = where.__name__, name, name
    setattr(where, name, value)
    return value


for name in ["_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"]:
    put(utils, lambda *args: None, name)
put(tensor_module, lambda *args: None, "_rebuild_from_type_v2")
STORAGES = {
    "Float": ("f", 4), "Half": ("e", 2), "BFloat16": (None, 2), "Double": ("d", 8), "Long": ("q", 8), "Bool": ("?", 1),
}
for name in STORAGES:
    put(torch, type(name + "Storage", (), {}), name + "Storage")
put(storage_module, type("UntypedStorage", (), {}), "UntypedStorage")


class DType:
    """Pickled by name, as torch.dtype is: its __reduce__ gives a string, found in the module torch."""

    def __init__(self, name):
        self.name = name
        setattr(torch, name, self)

    __module__ = "torch"

    def __reduce__(self):
        return self.name


float8 = DType("float8_e4m3fn")


class Storage:
    def __init__(self, kind, values):
        self.kind, self.count = kind, len(values)
        if kind == "Untyped":
            self.data = bytes(values)
        elif kind == "BFloat16":
            self.data = b"".join(struct.pack("<f", value)[2:] for value in values)
        else:
            self.data = struct.pack(f"<{len(values)}{STORAGES[kind][0]}", *values)


class Tensor:
    __module__ = "torch"

    def __init__(self, storage, shape, offset=0, strides=None, dtype=None):
        self.storage, self.shape, self.offset, self.dtype = storage, tuple(shape), offset, dtype
        if strides is None:
            strides, step = [], 1
            for size in reversed(shape):
                strides.insert(0, step)
                step *= size
        self.strides = tuple(strides)

    def arguments(self):
        return (self.storage, self.offset, self.shape, self.strides, False, collections.OrderedDict())

    def __reduce_ex__(self, protocol):
        if self.dtype is None:
            return utils._rebuild_tensor_v2, self.arguments()
        return utils._rebuild_tensor_v3, self.arguments() + (self.dtype,)


put(torch, Tensor, "Tensor")


class Parameter(Tensor):
    def __init__(self, data):
        self.data = data

    def __reduce_ex__(self, protocol):
        return utils._rebuild_parameter, (self.data, True, collections.OrderedDict())


put(parameter_module, Parameter, "Parameter")


class WithAttributes(Tensor):
    def __reduce_ex__(self, protocol):
        state = {"note": "an attribute"}
        return tensor_module._rebuild_from_type_v2, (utils._rebuild_tensor_v2, Tensor, self.arguments(), state)


class Pickler(pickle.Pickler):
    def __init__(self, out, protocol):
        super().__init__(out, protocol)
        self.storages = {}

    def persistent_id(self, thing):
        if not isinstance(thing, Storage):
            return None
        where = storage_module if thing.kind == "Untyped" else torch
        key = str(list(self.storages).index(id(thing)) if id(thing) in self.storages else len(self.storages))
        self.storages[id(thing)] = thing
        return ("storage", getattr(where, thing.kind + "Storage"), key, "cpu", thing.count)


def archive(members):
    out, directory = bytearray(), bytearray()
    for name, data in members:
        begin, encoded, crc = len(out), name.encode(), zlib.crc32(data)
        padding = -(begin + 30 + len(encoded) + 4) % 64
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        out += struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 0, 0x0808, 0, 0, 0, 0, 0, 0, len(encoded), len(extra))
        out += encoded + extra + data + struct.pack("<4sIII", b"PK\x07\x08", crc, len(data), len(data))
        directory += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 0, 0, 0x0808, 0, 0, 0, crc, len(data), len(data),
                                 len(encoded), 0, 0, 0, 0, 0, begin)
        directory += encoded
    at, count = len(out), len(members)
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), at)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(directory), at, 0)
    return bytes(out) + bytes(directory) + end64 + locator + end


def save(name, content, protocol=2):
    text = io.BytesIO()
    pickler = Pickler(text, protocol)
    pickler.dump(content)
    root = os.path.splitext(name)[0]
    members = [(f"{root}/data.pkl", text.getvalue()), (f"{root}/.format_version", b"1"), (f"{root}/byteorder", b"little")]
    members += [(f"{root}/data/{key}", storage.data) for key, storage in enumerate(pickler.storages.values())]
    members += [(f"{root}/version", b"3\n"), (f"{root}/.data/serialization_id", b"0" * 40)]
    with open(os.path.join(HERE, name), "wb") as file:
        file.write(archive(members))


def state(entries):
    made = collections.OrderedDict(entries)
    made._metadata = collections.OrderedDict([("", {"version": 1})])
    return made


floats = Storage("Float", [0.5 * i for i in range(12)])
small = Storage("BFloat16", [1.0, -2.0, 0.25])
content = state([
    ("embed.weight", Tensor(floats, [3, 4])),
    ("lm_head.weight", Tensor(floats, [3, 4])),
    ("layer.view", Tensor(floats, [2, 2], offset=4)),
    ("layer.parameter", Parameter(Tensor(small, [3]))),
    ("layer.attributes", WithAttributes(Storage("Half", [1.5, -0.5]), [1, 2], strides=[7, 1])),
    ("layer.float8", Tensor(Storage("Untyped", [0x38, 0xb8]), [2], dtype=float8)),
    ("layer.scalar", Tensor(Storage("Double", [3.0]), [])),
    ("layer.empty", Tensor(Storage("Float", []), [0, 5])),
    ("layer.positions", Tensor(Storage("Long", [0, 1, -2]), [3])),
    ("layer.mask", Tensor(Storage("Bool", [True, False]), [2])),
    ("step", 7),
])
save("pytorch_model.bin", content)
save("protocol4.pt", {"epoch": 3, "state_dict": dict(content)}, protocol=4)
save("transposed.bin", state([("w", Tensor(floats, [4, 3], strides=[1, 4]))]))
save("evil.bin", {"w": eval})
