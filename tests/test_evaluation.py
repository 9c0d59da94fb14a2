"""Evaluation and the importance-weighted bound."""

from __future__ import annotations

import math
import os
import signal
import sys

import pytest
import torch
from training_runs import TINY_TRAINING, digits_of, tiny_model, trainer

from nvae_fast.training import (
    evaluate,
    importance_bound,
    load_model,
    seeds,
)
from nvae_fast.training.evaluation import OnlineLogMeanExp
from nvae_fast.training.signals import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")


def test_second_interrupt_aborts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tensorboard_missing_is_said_before_anything_is_written(tmp_path, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install tensorboard"):
        trainer(tmp_path, digits, TINY_TRAINING.replace(tensorboard=True))
    assert not list(tmp_path.iterdir())


def test_online_log_mean_exp():
    values = torch.randn(50, 7, dtype=torch.float64) * 300
    online = OnlineLogMeanExp()
    for row in values:
        online.add(row)
    torch.testing.assert_close(online.value(), torch.logsumexp(values, 0) - math.log(50), rtol=1e-12, atol=0)
    online = OnlineLogMeanExp()
    for v in (-math.inf, -math.inf, 2.0):
        online.add(torch.tensor([v]))
    assert float(online.value()) == pytest.approx(2.0 - math.log(3))


def test_importance_bound_is_the_direct_computation(digits):
    model = tiny_model().eval()
    x = digits.batch(torch.arange(5), 0)
    bound, sums = importance_bound(model, x, 6, seed=3)
    terms, kl = [], 0.0
    for k in range(6):
        with torch.no_grad():
            out = model(x, seed=seeds.mix_seed(3, k))
            terms.append(
                -model.reconstruction_loss(out.logits, x).double() - out.log_q.double() + out.log_p.double()
            )
            kl += float(out.kl.sum()) / 6
    torch.testing.assert_close(
        bound, torch.logsumexp(torch.stack(terms), 0) - math.log(6), rtol=1e-12, atol=0
    )
    assert float(sums["kl"]) == pytest.approx(kl, rel=1e-6)
    single, _ = importance_bound(model, x, 1, seed=3)
    assert (bound >= single.new_tensor([-1e9])).all()
    torch.testing.assert_close(single, terms[0], rtol=1e-12, atol=0)


def test_evaluation_reports_nats_bits_and_active_channels(digits):
    model = tiny_model().train()
    few = digits_of(digits, 10)
    result = evaluate(model, few, samples=3, batch_size=4, seed=1)
    assert model.training
    assert result == evaluate(model, few, samples=3, batch_size=4, seed=1)
    assert result != evaluate(model, few, samples=3, batch_size=4, seed=2)
    assert result.images == 10
    assert result.negative_log_likelihood_bits_per_dim == pytest.approx(
        result.negative_log_likelihood / (math.log(2) * 1024)
    )
    assert result.negative_elbo == pytest.approx(result.reconstruction + result.kl)
    assert result.negative_log_likelihood < result.negative_elbo
    assert len(result.kl_per_group) == 2
    assert result.latent_channels == 4
    assert 0 <= result.active_channels <= 4
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        evaluate(model, few, samples=0)


def test_active_channels_count_what_carries_information(digits):
    model = tiny_model().eval()
    with torch.no_grad():  # a posterior equal to the prior, but for the first channel of the first group
        for head in model.posterior:
            head.log_weight_norm.fill_(-30.0)
            head.bias.zero_()
        model.posterior[0].bias[0] = 1.0
    result = evaluate(model, digits_of(digits, 8), batch_size=8)
    assert result.kl_per_group[0] > 1
    assert result.active_channels == 1


def test_load_model_is_the_trained_model(tmp_path, digits):
    run = trainer(tmp_path, digits)
    run.run()
    model, facts = load_model(tmp_path)
    assert facts["step"] == 6
    assert not model.training
    x = digits.batch(torch.arange(3), 0)
    run.model.eval()
    torch.testing.assert_close(model(x, seed=1).logits, run.model(x, seed=1).logits, rtol=1e-5, atol=1e-5)
