"""Data selection: a boss, which is any method, trains on the samples that something smaller lets through.

    name                    keeps sample i with                       weight       what it looks at          file
    uniform                 fraction                                  1            nothing                   plain
    autoassist              gamma + (1 - gamma) p_i                   1, 1/P(keep) a linear assistant        assistant
    selective_backprop      CDF(l_i)^beta of the latest 1024 losses   1            losses of a probe         scored
    online_batch_selection  probability falling with the loss's rank  1            losses of a probe         scored
    rho_loss                the largest l_i - irreducible_i           1            losses of a probe         irreducible
    self_paced              all                                       v(l_i)       losses when last trained  weighted
    screener_net            all                                       s(x_i)       a small network           weighted
    infobatch               1 - ratio if l_i < mean, else 1           1 / P(keep)  losses when last trained  weighted

    l_i   loss of sample i       p_i, s_i   what the assistant or screener makes of it, in (0, 1)

The boss trains on full batches of what was kept; an epoch is one scan of the data, for all of them. All but `uniform`,
`online_batch_selection` and `rho_loss` need the losses of what was trained: with a lag of 4 batches, so that a run can
be repeated bit for bit. `autoassist` has a lag of 0 by default: the boss never waits, it takes what has come.

Sources: Zhang, Yu and Dhillon 2019 (arXiv 1905.03381, autoassist); Jiang et al. 2019 (arXiv 1910.00762, selective
backprop); Loshchilov and Hutter 2015 (arXiv 1511.06343, online batch selection); Mindermann et al. 2022 (arXiv
2206.07137, rho_loss); Kumar et al. 2010 (self-paced learning); Kim and Choi 2018 (arXiv 1801.00904, ScreenerNet);
Qin et al. 2024 (arXiv 2303.04947, infobatch).
"""

from __future__ import annotations

from collections.abc import Mapping

from decoupled import registry
from decoupled.errors import UserError
from decoupled.method import Method, selecting
from decoupled.methods.data_selection.assistant import Assisted
from decoupled.methods.data_selection.irreducible import Irreducible
from decoupled.methods.data_selection.plain import Uniform
from decoupled.methods.data_selection.scored import Ranked, Selective
from decoupled.methods.data_selection.weighted import Pruned, Screened, SelfPaced
from decoupled.registry import register
from decoupled.selection import Selection


@register("uniform")
def uniform(boss: str | Mapping = "backprop", fraction: float = 0.5) -> Method:
    """Baseline: every sample is kept with the same probability."""
    _share("uniform", "fraction", fraction)
    return _with(boss, Uniform(fraction=fraction))


@register("autoassist")
def autoassist(
    boss: str | Mapping = "backprop", gamma: float = 0.3, gate: bool = True, lag: int = 0, unbiased: bool = False
) -> Method:
    """A linear assistant, trained beside the boss on its losses, leaves out samples that it holds to be easy."""
    _share("autoassist", "gamma", gamma)
    if lag < 0:
        raise UserError(f"autoassist needs a lag of at least 0 (takes what has arrived), got {lag}")
    return _with(boss, Assisted(gamma=gamma, gate=gate, lag=lag, weighs=unbiased))


@register("selective_backprop")
def selective_backprop(boss: str | Mapping = "backprop", beta: float = 2.0, stale: int = 1) -> Method:
    """Candidates are scored by a forward, and kept the likelier the more of the latest losses theirs exceeds."""
    if beta < 0 or stale < 1:
        raise UserError(f"selective_backprop needs beta of at least 0 and stale of at least 1, got {beta} and {stale}")
    return _with(boss, Selective(beta=beta, stale=stale))


@register("online_batch_selection")
def online_batch_selection(boss: str | Mapping = "backprop", fraction: float = 0.5, pressure: float = 100.0) -> Method:
    """Candidates are scored by a forward, and drawn with a probability that falls exponentially with their rank."""
    _share("online_batch_selection", "fraction", fraction)
    if pressure < 1:
        raise UserError(f"online_batch_selection needs a pressure of at least 1, got {pressure}")
    return _with(boss, Ranked(fraction=fraction, pressure=pressure, pool=round(1 / fraction)))


@register("rho_loss")
def rho_loss(
    boss: str | Mapping = "backprop", fraction: float = 0.5, holdout: float = 0.1, irreducible: str | None = None
) -> Method:
    """Candidates are scored by a forward, and those with most loss beyond the irreducible one are kept."""
    _share("rho_loss", "fraction", fraction)
    if not 0 < holdout < 1:
        raise UserError(f"rho_loss needs a holdout between 0 and 1, got {holdout}")
    known = None if irreducible is None else Irreducible.read(irreducible)
    return _with(boss, Irreducible(fraction=fraction, holdout=holdout, known=known, pool=round(1 / fraction)))


@register("self_paced")
def self_paced(boss: str | Mapping = "backprop", pace: int = 5) -> Method:
    """Samples get weights that fall with their last loss; within `pace` epochs the hard ones join in."""
    if pace < 1:
        raise UserError(f"self_paced needs a pace of at least 1 epoch, got {pace}")
    return _with(boss, SelfPaced(pace=pace))


@register("screener_net")
def screener_net(boss: str | Mapping = "backprop", margin: float = 1.0, lr: float = 1e-3) -> Method:
    """A small network, trained beside the boss on its losses, weighs every sample by what it says of the input."""
    if margin <= 0 or lr <= 0:
        raise UserError(f"screener_net needs a positive margin and lr, got {margin} and {lr}")
    return _with(boss, Screened(margin=margin, lr=lr))


@register("infobatch")
def infobatch(boss: str | Mapping = "backprop", ratio: float = 0.5, full_from: int | None = None) -> Method:
    """In every epoch a share of the samples with little loss is left out, and the rest of them weighs more."""
    if not 0 < ratio < 1:
        raise UserError(f"infobatch needs a ratio between 0 and 1, got {ratio}")
    return _with(boss, Pruned(ratio=ratio, full_from=full_from))


def _share(name: str, option: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name} needs a {option} above 0 and at most 1, got {value}")


def _with(boss: str | Mapping, selection: Selection) -> Method:
    try:
        return selecting(registry.make(boss), selection)
    except UserError as error:
        raise UserError(f"boss: {error}") from None
