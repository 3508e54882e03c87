"""Metrics: shares, areas under curves and calibration in closed form."""

import pytest
import torch

from training import report


def test_shares_are_by_category():
    prompts = ["a red circle", "two red circles", "a red circle and a blue star", "a red circle above a blue star"] * 2
    found = report.shares(prompts, [True, False, True, False, True, False, False, False])
    assert found == {"all": 0.375, "single": 1.0, "counting": 0.0, "binding": 0.5, "position": 0.0}


def test_area_under_the_curve_is_the_chance_of_the_right_order():
    scores = {"one": torch.tensor([0.9, 0.1, 0.5]), "two": torch.tensor([0.2, 0.3])}
    truth = {"one": torch.tensor([True, False, True]), "two": torch.tensor([True, False])}
    # over all: right .9, .5, .2 against wrong .1, .3
    assert report.judged(scores, truth) == {"auc": {"one": 1.0, "two": 0.0, "all": pytest.approx(5 / 6, abs=5e-4)}}


def test_calibration_is_the_gap_of_probability_and_share(tmp_path):
    scores = {"one": torch.tensor([0.05, 0.05]), "two": torch.tensor([0.75, 0.71])}
    truth = {"one": torch.tensor([False, False]), "two": torch.tensor([True, False])}
    found = report.calibrated(scores, truth, tmp_path)
    assert found["calibration"] == [
        {"low": 0.0, "high": 0.1, "mean": 0.05, "right": 0.0, "count": 2},
        {"low": 0.7, "high": 0.8, "mean": 0.73, "right": 0.5, "count": 2},
    ]
    assert found["ece"] == pytest.approx((2 * 0.05 + 2 * 0.23) / 4) and found["accuracy"] == 0.75
    assert (tmp_path / "reliability.png").is_file()
