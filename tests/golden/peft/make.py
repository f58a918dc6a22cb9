"""Makes the files of this directory: a tiny model, PEFT adapters on it, and what PEFT merges them into.

python make.py DIR   (peft 0.21.2, torch 2.15.0, transformers 5.24.0, safetensors 0.8.0)
"""
import copy, json, os, sys
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file

out = sys.argv[1]
torch.manual_seed(7)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        self.up_proj = nn.Linear(16, 24)
        self.down_proj = nn.Linear(24, 16, bias=False)
        self.c_attn = Conv1D(24, 16)  # stored as [16, 24]
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.LayerNorm(16)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 40, bias=False)


base = Model()


def save_model(model, name):
    os.makedirs(f"{out}/{name}", exist_ok=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, f"{out}/{name}/model.safetensors", metadata={"format": "pt"})


save_model(base, "base")
configs = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "embed", "conv"], modules_to_save=["norm"]),
    "rslora": LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, bias="all", target_modules=["q_proj", "down_proj", "head"],
        rank_pattern={"layers.1.q_proj": 7, "head": 70}, alpha_pattern={"down_proj": 11.5},
    ),
    "conv1d": LoraConfig(r=2, lora_alpha=3, fan_in_fan_out=True, target_modules=["c_attn"]),
    "ia3": IA3Config(target_modules=["q_proj", "up_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
for name, config in configs.items():
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad or ".lora_" in key or ".ia3_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(f"{out}/{name}", safe_serialization=True)
    os.remove(f"{out}/{name}/README.md")
    path = f"{out}/{name}/adapter_config.json"
    config = json.load(open(path))
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        if config.get(key):
            config[key] = sorted(config[key])
    json.dump(config, open(path, "w"), indent=2, sort_keys=True)
    open(path, "a").write("\n")
    save_model(model.merge_and_unload(), f"{name}-merged")
