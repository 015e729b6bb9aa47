"""Augmentation of images and event frames (snnfast.train)."""

from __future__ import annotations

import pytest
import torch

from snnfast.train.augment import Augment
from snnfast.train.errors import InputError


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_crop_and_flip_are_windows_of_the_padded_image() -> None:
    x = torch.randint(1, 256, (40, 2, 8, 8), dtype=torch.uint8)
    augment = Augment(("crop", "flip"), torch.zeros(2), torch.ones(2))
    moved = (augment(x, generator()) * 255).round().byte()
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    seen = set()
    for image, source in zip(moved, padded, strict=True):
        windows = {(dy, dx): source[:, dy : dy + 8, dx : dx + 8] for dy in range(3) for dx in range(3)}
        matches = [
            (at, f) for at, w in windows.items() for f in (False, True) if torch.equal(image, w.flip(2) if f else w)
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) > 10
    assert torch.equal(moved, (augment(x, generator()) * 255).round().byte())


def test_cutout_zeroes_one_square() -> None:
    x = torch.full((60, 1, 16, 16), 255, dtype=torch.uint8)
    y = Augment(("cutout",), torch.tensor([0.5]), torch.tensor([0.5]))(x, generator())
    assert set(y.unique().tolist()) == {0.0, 1.0}
    for image in y[:, 0]:
        rows, columns = (image == 0).any(1), (image == 0).any(0)
        assert torch.equal(image == 0, rows[:, None] & columns[None])
        assert 4 <= rows.sum() <= 7
        assert torch.equal(torch.where(rows)[0].diff().unique(), torch.tensor([1]))


def test_randaugment_changes_images_within_their_range() -> None:
    x = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    augment = Augment(("randaugment",), torch.zeros(3), torch.ones(3))
    y = augment(x, generator())
    assert y.min() >= 0
    assert y.max() <= 1
    same = (y - x / 255).abs().amax((1, 2, 3)) < 1e-3
    assert 0 < same.float().mean() < 0.1  # two draws of "none" now and then
    weak = Augment(("randaugment",), torch.zeros(3), torch.ones(3), magnitude=1e-4)(x, generator())
    assert (weak - x / 255).abs().mean() < 2e-3  # every strength goes to nothing with the magnitude


@pytest.mark.parametrize("kinds", [(), ("crop", "flip", "cutout"), ("randaugment", "crop")])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(kinds: tuple[str, ...]) -> None:
    x = torch.randint(0, 256, (12, 3, 10, 10), dtype=torch.uint8)
    augment = Augment(kinds, torch.full((3,), 0.4), torch.full((3,), 0.2))
    whole = augment(x, generator())
    for part in (slice(0, 4), slice(4, 12)):
        assert torch.equal(augment(x[part], generator(), part, 12), whole[part])


def test_event_frames_move_together() -> None:
    x = torch.randint(0, 4, (6, 5, 2, 12, 12), dtype=torch.uint8)
    x[:] = x[:, :1]  # the same in all steps
    y = Augment(("crop", "cutout"), torch.zeros(2), torch.ones(2), events=True)(x, generator())
    assert y.shape == (5, 6, 2, 12, 12)
    assert torch.equal(y, y[:1].expand_as(y))
    assert set(y.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}  # counts stay counts
    with pytest.raises(InputError, match="event frames take crop, flip and cutout"):
        Augment(("randaugment",), torch.zeros(2), torch.ones(2), events=True)
    with pytest.raises(InputError, match="did you mean 'crop'"):
        Augment(("crp",), torch.zeros(2), torch.ones(2))
