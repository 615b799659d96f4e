"Ranks and their metrics against PyKEEN's evaluator, on the same scores; skipped where PyKEEN is not installed."
import pytest
import torch

from memory_notebook.reasoning.knowledge import KnowledgeGraphModel, Ranks, family_graph, filtered_ranks, rank_metrics

NAMES = {
    "mrr": "inverse_harmonic_mean_rank", "mr": "arithmetic_mean_rank", "amri": "adjusted_arithmetic_mean_rank_index",
    "hits1": "hits_at_1", "hits3": "hits_at_3", "hits10": "hits_at_10",
}


def differences() -> dict[str, float]:
    "The largest difference of each metric, over sides and conventions for ties."
    from pykeen.evaluation import RankBasedEvaluator
    graph = family_graph(seed=5)
    model = KnowledgeGraphModel(graph, dim=20, epochs=3)
    model.learn(graph)
    known = torch.cat(graph[:3])
    relations = len(graph.relations)
    peer = RankBasedEvaluator()
    ours = {"head": [], "tail": []}
    for side, given, asked in (("tail", 0, 2), ("head", 2, 0)):
        h, r, target = graph.test[:, given], graph.test[:, 1], graph.test[:, asked]
        with torch.no_grad(): scores = model.scores(h, r + (relations if side == "head" else 0))
        scores = (scores * 4).round() / 4  # many ties
        hidden = scores.clone()
        pairs = [
            (i, known[j, asked].item())
            for i, row in enumerate(graph.test)
            for j in ((known[:, given] == row[given]) & (known[:, 1] == row[1])).nonzero()[:, 0].tolist()
        ]
        query, answer = torch.tensor(pairs).T
        ours[side] = filtered_ranks(scores, target, query, answer)
        true = scores.gather(1, target[:, None])
        hidden[query, answer] = torch.nan  # PyKEEN's mark of what is filtered
        hidden.scatter_(1, target[:, None], true)
        peer.process_scores_(graph.test, side, hidden, true)
    theirs = peer.finalize()
    ours["both"] = Ranks(*(torch.cat(pair) for pair in zip(ours["head"], ours["tail"])))
    return {
        name: max(
            abs(rank_metrics(ours[side], ties)[name] - theirs.get_metric(f"{side}.{ties}.{long}"))
            for side in ours for ties in ("optimistic", "realistic", "pessimistic")
            if name != "amri" or ties == "realistic"  # PyKEEN has no other AMRI
        )
        for name, long in NAMES.items()
    }


def test_ranks_are_those_of_pykeen() -> None:
    pytest.importorskip("pykeen")
    assert max(differences().values()) < 1e-6


def test_whole_test_set_is_ranked_as_one_by_one() -> None:
    "The model's batched ranks, against one question at a time and sets of known answers."
    graph = family_graph(seed=6, families=1)
    model = KnowledgeGraphModel(graph, dim=8, epochs=2)
    model.learn(graph)
    model.weights = {"cases": 0.2, "rules": 0.0}
    every = torch.cat(graph[:3])
    known = {tuple(row) for row in every.tolist()}
    ranks = model.ranks(graph.test, every, most=7)
    want = []
    for side in ("tail", "head"):
        for h, r, t in graph.test.tolist():
            given, asked, kind = (h, t, r) if side == "tail" else (t, h, r + len(graph.relations))
            with torch.no_grad(): scores = model.scores(torch.tensor([given]), torch.tensor([kind]))[0].tolist()
            fact = lambda x, h=h, r=r, t=t, side=side: (h, r, x) if side == "tail" else (x, r, t)
            others = [s for x, s in enumerate(scores) if x != asked and fact(x) not in known]
            want.append(1 + sum(s > scores[asked] for s in others))
    assert ranks.optimistic.tolist() == want
