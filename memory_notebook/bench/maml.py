"""MAML with the tasks side by side against MAML as it is usually written, a loop over the tasks."""
import torch
from torch import Tensor

from memory_notebook.agent.meta import MetaLearner, sine_net, sinusoids
from memory_notebook.core import set_seed
from memory_notebook.runs import Run, benchmark, race


def loop_loss(learner: MetaLearner, x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
    "Task after task: the mean of `MetaLearner.outer_losses` with the same arguments."
    losses = []
    start = learner.start()
    for task in range(len(x)):
        fast = dict(start)
        for _ in range(learner.inner_steps):
            grads = torch.autograd.grad(learner.loss(fast, x[task], y[task]), list(fast.values()), create_graph=True)
            fast = {n: p - rate * g for (n, p), rate, g in zip(fast.items(), learner.rates, grads)}
        losses.append(learner.loss(fast, xq[task], yq[task]))
    return torch.stack(losses).mean()


def _step_ms(tasks: int, shots: int, inner_steps: int, turns: int) -> dict[str, float]:
    "Median milliseconds of a meta-step, side by side and in the loop: forward, backward and Adam on the sine network."
    set_seed(0)
    learner = MetaLearner(sine_net(), inner_steps=inner_steps)
    optimizer = torch.optim.Adam(learner.parameters(), fused=True)
    x, y, _ = sinusoids(tasks, 2 * shots)
    data = x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]

    def together():
        learner.meta_step(optimizer, *data)

    def loop():
        optimizer.zero_grad()
        loop_loss(learner, *data).backward()
        optimizer.step()

    for step in (together, loop): step()  # warm
    return {name: 1e3 * s for name, s in race({"vmap": together, "loop": loop}, turns).items()}


@benchmark("maml", help="a second-order MAML step: the tasks side by side against a loop over them")
def bench_maml(run: Run, *, tasks: int = 32, shots: int = 10, inner_steps: int = 3, turns: int = 10) -> dict:
    "Milliseconds and `maml.speedup_vs_loop`, and the same with a single inner step."
    out = {}
    for tail, steps in (("", inner_steps), ("_1_step", 1)):
        ms = _step_ms(tasks, shots, steps, turns)
        out |= {
            f"maml.speedup_vs_loop{tail}": ms["loop"] / ms["vmap"],
            f"maml.vmap_ms{tail}": ms["vmap"],
            f"maml.loop_ms{tail}": ms["loop"],
        }
    return out
