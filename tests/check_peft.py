"""Adapters that tiesmith merges, loaded by PEFT and compared with what PEFT and torch make of the inputs.

python tests/check_peft.py TIESMITH DIR   (run with peft 0.21.2, torch 2.15.0)
"""
import os, subprocess, sys
import torch
from torch import nn
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

exe, work = sys.argv[1], sys.argv[2]
os.makedirs(work, exist_ok=True)
torch.manual_seed(3)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.q_proj = nn.Linear(16, 48)
        self.up_proj = nn.Linear(16, 240)
        self.conv = nn.Conv2d(4, 6, 3)
    def forward(self, x):
        h = self.embed(x)
        return self.q_proj(h).sum(-1) + self.up_proj(h).sum(-1)
def fresh():
    torch.manual_seed(1)
    return Model()
def randomise(m, seed):
    g = torch.Generator().manual_seed(seed)
    for n, p in m.named_parameters():
        if "lora_" in n: p.data = torch.randn(p.shape, generator=g) * 0.2
        if "ia3_" in n: p.data = 1 + 0.1 * torch.randn(p.shape, generator=g)
    return m
configs = [
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "embed", "conv"]),
    LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 2}),
    LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "embed", "conv"]),
]
deltas = []
base = fresh().state_dict()
for i, c in enumerate(configs):
    m = randomise(get_peft_model(fresh(), c), i)
    m.save_pretrained(f"{work}/a{i}")
    merged = m.merge_and_unload().state_dict()
    deltas.append({k: merged[k] - base[k] for k in base})
def run(*args):
    out = subprocess.run([exe, *args], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout
models = sum([["--model", f"{work}/a{i}"] for i in range(3)], [])
# Linear: exact at the sum of ranks.
run("merge", "--method", "linear", *models, "--rank", "13", "--out", f"{work}/linear", "--force")
loaded = PeftModel.from_pretrained(fresh(), f"{work}/linear").merge_and_unload().state_dict()
worst = 0
for k in base:
    want = base[k] + sum(d[k] for d in deltas) / 3
    worst = max(worst, (loaded[k] - want).abs().max().item())
print("linear, rank 13: largest difference", worst)
assert worst < 1e-5
# TIES, tensor scope: against torch.svd of the merged change of PEFT's own models.
run("merge", *models, "--density", "0.4", "--scope", "tensor", "--rank", "5", "--out", f"{work}/ties", "--force")
loaded = PeftModel.from_pretrained(fresh(), f"{work}/ties").merge_and_unload().state_dict()
for k in ["q_proj.weight", "up_proj.weight", "embed.weight", "conv.weight"]:
    T = torch.stack([d[k].double().flatten() for d in deltas])
    n = T.shape[1]
    for row in T:
        keep = int(n * 0.4)
        thr = row.abs().sort(descending=True).values[keep - 1]
        row[row.abs() < thr] = 0
    sign = T.sum(0).sign()
    agree = (T.sign() == sign) & (T != 0)
    m = ((T * agree).sum(0) / agree.sum(0).clamp(min=1)).reshape(base[k].shape[0], -1)
    got = (loaded[k] - base[k]).double().reshape(m.shape)
    s = torch.linalg.svdvals(m)
    best = (s[5:] ** 2).sum().sqrt().item()
    err = (m - got).norm().item()
    print(k, "error", err, "best of rank 5", best)
    assert err < best * 1.001 + 1e-5, k
# Same rank, factor by factor; and (IA)3.
c = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "embed", "conv"])
for i in range(2):
    randomise(get_peft_model(fresh(), c), 10 + i).save_pretrained(f"{work}/s{i}")
run("merge", "--model", f"{work}/s0", "--model", f"{work}/s1", "--out", f"{work}/same", "--force")
PeftModel.from_pretrained(fresh(), f"{work}/same")
c = IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
for i in range(2):
    randomise(get_peft_model(fresh(), c), 20 + i).save_pretrained(f"{work}/i{i}")
run("merge", "--model", f"{work}/i0", "--model", f"{work}/i1", "--out", f"{work}/ia3", "--force")
PeftModel.from_pretrained(fresh(), f"{work}/ia3")
print("all load")
