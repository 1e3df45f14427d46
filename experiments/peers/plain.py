"""GPT-2 in plain PyTorch: the peer of whoever has no checkout of nanoGPT.

The same function as gptjax's recipes without biases: pre-norm LayerNorm, tanh GELU, learned
positions, tied token table. Parameters have GPT-2's own names, so that one file of weights serves
every side.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        qkv = self.c_attn(x_BTD).view(B, T, 3, self.heads, D // self.heads)
        q_BNTH, k_BNTH, v_BNTH = qkv.permute(2, 0, 3, 1, 4)
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        return self.c_proj(y_BNTH.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn, self.mlp = Attention(width, heads), FeedForward(width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT(nn.Module):
    def __init__(self, vocab_size: int, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(Block(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width, bias=False),
            }
        )

    def forward(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V) and the mean loss in nats per token, as nanoGPT's model returns them."""
        t = self.transformer
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = t.wte(tokens_BT) + t.wpe(places_T)
        for block in t.h:
            x_BTD = block(x_BTD)
        logits_BTV = t.ln_f(x_BTD) @ t.wte.weight.T
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def load_gpt2(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Sets the weights from tensors by GPT-2's names; its biases are passed over.

    GPT-2 stores its projections (`c_...`) as (in, out), PyTorch as (out, in). A projection to the
    vocabulary (`lm_head`) that shares the token table is set with it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors[name]
            parameter.copy_(tensor.T if ".c_" in name else tensor)
