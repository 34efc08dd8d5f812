#!/usr/bin/env python3
"""Train a compact vision transformer on CIFAR-10 and export it to ONNX.

    python models/train_vit.py cifar10.npz models/vit_tiny_cifar10.onnx

The network is a plain ViT: patch 4 on 32 x 32 pixels, width 192, depth 6, 3 heads, class token, GELU, pre-norm, 2.7 M
parameters. Muon updates the matrices of the blocks and AdamW everything else, on a cosine schedule; crops, flips and a
light colour jitter augment the images. The first two thirds of the epochs see a random half of the patches (PatchDropout,
arXiv 2208.07220), which halves their cost. The last epoch's weights are exported: the test images are read once, after
training, to print the accuracy.

``cifar10.npz`` holds ``x_train, y_train, x_test, y_test``: uint8 images [N, 32, 32, 3] and uint8 labels [N].
Training is data parallel over ``--workers`` processes of one thread each, which on a CPU beats one process of many.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, image: int = 32, patch: int = 4, width: int = 192, depth: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, pixel_values: torch.Tensor, kept_patches: int | None = None) -> torch.Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        if kept_patches is not None:
            patches = 1 + torch.rand(x.shape[0], x.shape[1] - 1).topk(kept_patches).indices
            x = torch.cat([x[:, :1], x.gather(1, patches[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 [N, 3, 32, 32] -> normalized float32: shift by up to 4 pixels, flip, jitter brightness and contrast."""
    count = len(images)
    x = F.pad(images.float() / 255, (4, 4, 4, 4), mode="reflect")
    rows, columns = (torch.randint(0, 9, (count, 1), generator=generator) + torch.arange(32) for _ in range(2))
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    x = x[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    contrast, brightness = (0.2 * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1) for _ in range(2))
    mean = x.mean((1, 2, 3), keepdim=True)
    return normalize((x - mean) * (1 + contrast) + mean * (1 + brightness))


def normalize(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in float32 of uint8 [N, 3, 32, 32] images."""
    model.eval()
    with torch.inference_mode():
        hits = [(model(normalize(x.float() / 255)).argmax(1) == y).sum() for x, y in zip(images.split(250), labels.split(250), strict=True)]
    return float(torch.stack(hits).sum() / len(labels))


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(others, lr=0.002, weight_decay=0.02, betas=(0.9, 0.95)),
    ]


def train(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(options.seed + rank)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(options.port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=options.workers)

    with np.load(options.data) as data:
        images = torch.from_numpy(data["x_train"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(data["y_train"]).long()
        test_images = torch.from_numpy(data["x_test"]).permute(0, 3, 1, 2)
        test_labels = torch.from_numpy(data["y_test"]).long()
    model = ViT()
    parallel = DistributedDataParallel(model)
    steppers = optimizers(model)
    steps_per_epoch = len(images) // options.batch
    steps = options.epochs * steps_per_epoch
    warmup = min(steps // 10, steps_per_epoch)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / warmup, 0.5 * (1 + np.cos(np.pi * t / steps)))) for o in steppers
    ]
    order = torch.Generator().manual_seed(options.seed)  # the same permutation in every worker
    jitter = torch.Generator().manual_seed(options.seed + 1 + rank)
    began = time.time()
    for epoch in range(options.epochs):
        model.train()
        kept_patches = 32 if epoch < 2 * options.epochs // 3 else None
        permutation = torch.randperm(len(images), generator=order)[: steps_per_epoch * options.batch]
        total = 0.0
        for batch in permutation.view(steps_per_epoch, options.batch):
            mine = batch[rank :: options.workers]
            x = augment(images[mine], jitter)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                loss = F.cross_entropy(parallel(x, kept_patches).float(), labels[mine], label_smoothing=0.1)
            for stepper in steppers:
                stepper.zero_grad(set_to_none=True)
            loss.backward()
            for stepper, schedule in zip(steppers, schedules, strict=True):
                stepper.step()
                schedule.step()
            total += float(loss.detach())
        if rank == 0:
            print(f"epoch {epoch + 1}/{options.epochs}  loss {total / steps_per_epoch:.3f}  {time.time() - began:.0f} s", flush=True)
            if options.checkpoint:
                torch.save(model.state_dict(), options.checkpoint)

    if rank == 0:
        export(model, options.output)
        accuracy = evaluate(model, test_images, test_labels)
        print(f"top-1 on {len(test_labels)} test images: {accuracy:.4f}")
    torch.distributed.destroy_process_group()


def export(model: nn.Module, path: Path) -> None:
    """Write ``model`` as one ONNX file: opset 20, dynamic batch, input ``pixel_values``, output ``logits``.

    Of the exporter's metadata only the module scopes stay: the rest holds paths of the machine it ran on.
    """
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 3, 32, 32),),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=20,
        dynamo=True,
    )
    proto = program.model_proto
    for holder in [proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        kept = [p for p in holder.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
        del holder.metadata_props[:]
        holder.metadata_props.extend(kept)
    onnx.save(proto, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10 as .npz")
    parser.add_argument("output", type=Path, help="the ONNX file to write")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256, help="images per step, over all workers")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 autocast: twice as fast where the CPU has bf16 matrix units, slower elsewhere"
    )
    parser.add_argument("--checkpoint", type=Path, help="save the weights here after every epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=29517, help="loopback port for the workers to meet at")
    options = parser.parse_args()
    torch.multiprocessing.spawn(train, (options,), nprocs=options.workers)


if __name__ == "__main__":
    main()
