"""What every key of every golden trace is here: an argument of ``tta.wrap``, a field, a state key.

``ARRAYS`` has the arrays, up to their first slash; ``HPARAMS`` the entries of the JSON beside them,
nested ones joined by dots. The replaying tests read their comparisons with ``report`` off this
table (:func:`figures`), and a test fails for a key that it lacks. How an entry begins says what it
is:

| beginning | meaning |
|---|---|
| ``model``, ``stream`` | the network and what it is fed |
| ``wrap``, ``source``, ``field`` | arguments of ``tta.wrap``, ``SourceStatistics``, a config |
| ``call`` | something the test does |
| ``output``, ``report``, ``state``, ``constant`` | compared with what the adapter gives |
| ``piece`` | in or out of single functions, in the test of that file |
| ``none`` | provenance, or not to be asserted, and why |
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["ARRAYS", "HPARAMS", "entries", "figures", "unknown"]

ARRAYS: dict[str, dict[str, str]] = {
    "set-a": {
        "weights": "model: state_dict",
        "inputs": "stream: images",
        "labels": "none: no method sees them",
        "hparams": "field: see HPARAMS",
        "source_outputs": "output: the model before wrapping",
        "outputs": "output: adapter(images); lame: its exp",
        "outputs_bethgelab": "output: adapter(images)",
        "unofficial": "output: adapter(images), alpha_bn with unbiased=False",
        "adapted": "state: param/<name>",
        "param_names": "report: list(adapter.parameters_adapted)",
        "opt": "state: optim/<name>.<slot>",
        "decision_slack": "none: provenance",
        "fisher_inputs": "source: batches",
        "fisher": "constant: update/fisher.<name>",
        "n_reliable": "report.reliable",
        "n_selected": "report.selected",
        "n_filter1": "report.selected",
        "n_filter2": "report.selected_second",
        "loss": "report.loss",
        "loss_second": "report.loss",
        "ewc_term": "report.fisher_penalty",
        "sam_grad_norm": "report.gradient_norm",
        "ema_probs": "state: update/ema_probs",
        "ema": "state: update/ema",
        "resets": "report.resets: its growth",
        "reset_before_batch": "report.resets: its growth",
        "init": "state: norm/<layer>.means and .vars, loaded before the first batch",
        "final": "state: norm/<layer>.means and .vars; norm traces: none, buffers nobody reads",
        "momentum": "report: rule.rate of every layer",
        "features": "none: what lame is fed; its outputs depend on them",
        "source_probs": "none: softmax of source_outputs",
        "stop_iteration": "none: differs by machine, the README says not to assert it",
    },
    "set-b": {
        "weights": "model: state_dict",
        "inputs": "stream: images, divided by 255; pieces_aug: piece",
        "labels": "output: with `correct`, argmax of the outputs",
        "correct": "output: with `labels`",
        "aug": "wrap: augment=",
        "restore_masks": "wrap: restore_mask=",
        "hparams_json": "field: see HPARAMS",
        "kind": "none: the method, again",
        "official_commit": "none: provenance",
        "meta_f32_vs_f64_max_abs_diff": "none: provenance",
        "meta_stream_subseed": "none: provenance",
        "outputs": "output: adapter(images); adanpc: its exp",
        "loss_ent": "report.consistency",
        "para_loss": "report.prior",
        "anchor_conf": "report.anchor_confidence",
        "used_aug": "report.augmented",
        "student_logits": "output: the model on the batch, before the update",
        "student_after_step0": "state: param/<name>",
        "student_after_warmup": "state: param/<name>, after wrap",
        "student_final": "state: param/<name>",
        "teacher_logits": "output: the teacher on the batch, before the update",
        "teacher_after_step0": "state: update/teacher.<name>",
        "teacher_after_warmup": "state: update/teacher.<name>, after wrap",
        "teacher_final": "state: update/teacher.<name>",
        "cov": "source: posterior_variance",
        "mean": "source: posterior_mean",
        "fisher_threshold": "report.fisher_threshold",
        "fisher_flat_first": "output: squared gradients of the first step",
        "fisher_flat_last": "output: squared gradients of the last step",
        "fim_restore_mask_flat": "output: mask of the step",
        "fim_n_restored": "report.restored",
        "source_inputs": "source: batches",
        "source_labels": "source: batches, or feature_labels",
        "projector_init": "state: update/projector.<name>, loaded before the first batch",
        "projector_final": "state: update/projector.<name>",
        "prototypes": "constant: update/prototypes; without source_inputs source: prototypes",
        "prototype_index": "output: nearest prototype of the student's features",
        "loss_total": "report.loss",
        "loss_contrastive": "report.contrastive",
        "loss_sce_orig": "report.self_training",
        "loss_sce_aug": "report.self_training_view",
        "loss_ce_src": "report.source",
        "source_features": "source: features where there are no images; constant: "
        "output/source_features",
        "memory_init": "source: memory_init",
        "test_features": "output: what the classifier is fed",
        "double_softmax_conf": "output: largest softmax of the scores",
        "memory_after_source": "constant: output/source_features, normalised",
        "memory_label_after_source": "constant: output/source_labels",
        "memory_size": "report.memory_size",
        "memory_tail_final": "state: output/memory",
        "memory_label_final": "constant: output/source_labels, then state: output/memory_labels",
        "bn_final": "state: output/weight and output/bias; its statistics are 0 and 1",
        # Single functions: the test of each file reads all of its keys.
        r"(ce_cifar|ce_imagenet|sce_\d|slr)_(per_sample|grad)": "piece: losses",
        r"entropy_per_sample|sce_alpha|logits_(student|teacher)": "piece: losses",
        r"con_(\d_(loss|grad_features|grad_proj0_weight)|features|temperature)|projector": "piece: "
        "losses.contrastive",
        r"ema_(alpha|out|student|teacher)": "piece: OtherWeights.follow",
        r"quantile_(arr|perc|value|n_below)(_zeros)?": "piece: low_values",
        r"snapshots|swa_(mean|sqmean|cov)|cov_min": "piece: Moments",
        r"reg_(loss|grad)": "piece: prior",
        r"memory|memory_label|queries|max_similarity|ks|temps": "piece: vote",
        r"eps_balls|scores|scores_eps": "piece: vote",
        r"conf_double_softmax|appended_labels|scores_after_append_all": "piece: vote",
        r"(cotta|roid)_\d": "piece: make_view",
        r"seeds_(cotta|roid)": "none: they re-run the official code",
    },
    "set-d": {
        "weights": "model: state_dict",
        "inputs": "stream: images",
        "labels": "none: no method sees them",
        "hparams": "field: see HPARAMS",
        "source_outputs": "output: the model before wrapping",
        "outputs": "output: adapter(images)",
        "adapted": "state: param/<name>",
        "param_names": "report: list(adapter.parameters_adapted)",
        "opt": "state: optim/<name>.<slot>",
        "decision_slack": "none: provenance",
        "loss": "report.loss",
        "n_selected": "report.selected",
        "mean_logit_entropy": "report.mean_logit_entropy",
        "flip_rate": "report.flip_rate",
        "p_fisher": "report.penalty_weight",
        "consolidation": "report.penalty",
        "scope": "report.scope",
        "cum_entropy": "state: guard/threshold",
        "reset": "output: health['action'] and report.resets",
        "first_reset_after_batch": "call: when the next three are compared",
        "params_after_first_reset": "state: param/<name>",
        "fisher_after_first_reset": "state: guard/fisher.<name>",
        "mean_after_first_reset": "state: guard/mean.<name>",
        "source_inputs": "source: batches",
        "source_mean": "source: feature_mean, the last D of all blocks'",
        "source_std": "none: of the search for prompts",
        "hist_after": "state: output/shift is source_mean less this",
        "features": "output: what the classifier is fed",
        "entropy": "output: of the plain logits; COME: opinion entropy of them",
        "entropy_second": "none: of the second pass, whose kept rows are counted",
        "ema_probs": "state: update/ema_probs",
        "ema": "state: update/ema",
        "n_reliable": "report.reliable; sar: report.selected",
        r"logits|grad_of_mean": "piece: losses.opinion_entropy",
        r"warmup_(supports|labels|entropy)": "state: output/support*, after wrap",
        "support_count": "state: output/support_labels, counted",
        r"support(s|_labels|_entropy)_final": "state: output/support*",
    },
    "set-e": {
        "weights": "model: state_dict",
        "inputs": "stream: images; bytes are divided by 255",
        "labels": "none: no method sees them",
        "hparams": "field: see HPARAMS",
        "source_outputs": "output: the model before wrapping; aetta: none, equal to logits",
        "decision_slack": "none: provenance",
        "logits": "output: adapter(images); piece: dropout_error",
        "dropout_logits": "none: the estimate depends on them; piece: dropout_error",
        "dropout_masks": "wrap: draws=",
        "agreement": "output: health['dropout_agreement']",
        "entropy_of_mean": "output: health['dropout_entropy']",
        "softmax_mean": "none: nothing depends on it",
        "softmax_std": "none: nothing depends on it",
        "estimated_accuracy": "output: health['estimated_accuracy'], in percent",
        "reset_after": "output: health['action']",
        "true_accuracy": "none: no guard sees it",
        "aug": "none: no method here makes views",
        "outputs": "output: adapter(images)",
        "outputs_own_source_mean": "output: adapter(images) with use_source_mean=True",
        "features": "output: what the classifier is fed",
        "center_after": "state: output/centre",
        "count_after": "state: output/count",
        "source_inputs": "source: batches",
        "source_mean": "source: feature_mean",
        "bn_final": "state: norm/<layer>.mean and .var",
    },
}

HPARAMS: dict[str, dict[str, str]] = {
    "set-a": {
        "method": "wrap: recipe or update",
        r"name|repo|commit|run_seed|stream\..*": "none: provenance",
        r"model\..*": "model: see tests.helpers.nets.trace_model",
        "optimizer.name": "field: optimizer",
        r"optimizer\.(lr|momentum|nesterov|weight_decay|betas|rho)": "field: of the same name",
        "params.alpha_test": "field: 1 - source_weight",
        "params.steps": "field: steps",
        r"params\.(episodic|reset_before)": "call: reset() before these batches",
        "params.e_margin": "field: entropy_margin * ln C",
        "params.margin_e0": "field: entropy_margin * ln C",
        "params.d_margin": "field: redundancy_margin",
        "params.fisher_alpha": "field: fisher_weight",
        "params.fisher_last_batch": "source: length of the last batch",
        "params.reset_every": "field: reset_every",
        "params.K": "field: components",
        "params.bs": "field: batch_size",
        "params.bs_max": "field: batch_size_max",
        "params.init_seed": "none: the draws themselves are given",
        "params.inner": "wrap: update",
        r"params\.tent_cfg\..*": "field: of the same name",
        "params.eps": "field: official=True of bn",
        r"params\.(momentum|reset_stats|no_stats)": "none: of buffers nobody reads",
        "params.variants": "field: affinity, neighbours, symmetric",
    },
    "set-b": {
        r"method|algo": "wrap: update, output; petal: restore",
        r"kind|seed|shifts|projector_seed|warmup_steps": "none: provenance",
        r"widths|num_classes|img_size": "model: its shape; pieces: that of their inputs",
        "optim.method": "field: optimizer",
        r"optim\.(lr|momentum|nesterov)": "field: of the same name",
        "optim.beta": "field: betas[0]",
        "optim.wd": "field: weight_decay",
        "optim.dampening": "none: always 0",
        "steps": "field: steps",
        r"episodic|reset_before": "call: reset() before these batches",
        "mt": "field: teacher_momentum",
        "rst": "field: restore_probability",
        "ap": "field: confidence_threshold",
        "n_aug": "field: views",
        "variant": "field: symmetric_loss, True for imagenet",
        "spw": "field: prior_weight",
        "damp": "field: damping",
        "perc": "field: restore_quantile",
        "lambda_ce_src": "field: weight_source",
        "lambda_ce_trg": "field: weight_target",
        "lambda_cont": "field: weight_contrastive",
        "contrast_mode": "none: always 'all', the other is not offered",
        "projection_dim": "field: projection_dim",
        "num_samples_warm_up": "field: warmup_samples",
        "temperature": "field: temperature",
        "k": "field: neighbours",
        "beta": "field: confidence_threshold",
        "eps_ball": "field: ball_radius",
        "gamma": "field: rounds",
        r"lr|alpha": "field: lr is their product",
        "weight_decay": "field: weight_decay",
    },
    "set-d": {
        "method": "wrap: recipe, or update and guard",
        r"repo|commit|weights_of": "none: provenance",
        r"model\..*": "model: see tests.helpers.nets.trace_model",
        "optimizer.name": "field: optimizer",
        r"optimizer\.(lr|momentum|nesterov|weight_decay)": "field: of the same name",
        r"params\.(e_margin|margin_e0)": "field: entropy_margin * ln C",
        "params.d_margin": "field: redundancy_margin",
        "params.m0": "field: flip_weight",
        "params.p0": "field: penalty",
        "params.a0": "field: threshold",
        "params.r0": "field: keep_share",
        "params.r1": "field: keep_slope",
        "params.reset_before": "call: reset() before these batches",
        "K": "piece: losses.opinion_entropy",
        "params.K": "field: opinion_classes",
        "params.uniform": "none: K in words",
        "params.steps": "field: steps",
        "params.filter_K": "field: filter_size, None for -1",
        "params.bn": "wrap: norm",
    },
    "set-e": {
        r"method|kind": "wrap: recipe or guard; piece",
        r"repo|commit|weights_of": "none: provenance",
        r"model\..*": "model: see tests.helpers.nets.trace_model",
        "params.passes": "field: passes",
        "params.dropout": "field: dropout",
        "params.dropout_after_stages": "field: places",
        "params.max_entropy": "field: official=True",
        "params.classes": "model: its classes",
        "params.ema": "field: momentum",
        "params.masks": "none: how dropout_masks is packed",
        "params.reset_before": "call: reset() before these batches",
        "params.last_rows": "stream: length of the last batch, 0 = all",
        "params.frozen_from": "call: freeze() before this batch",
        "params.rule": "field: momentum, None for mean",
        "params.alpha": "field: momentum",
        "params.momentum": "field: momentum",
    },
}


def entries(hparams: Any, prefix: str = "") -> list[str]:
    """Keys of nested dictionaries, joined by dots."""
    if not isinstance(hparams, dict):
        return [prefix]
    return [
        key
        for name, value in hparams.items()
        for key in entries(value, f"{prefix}.{name}" if prefix else name)
    ]


def unknown(keys: list[str], table: dict[str, str]) -> set[str]:
    """The keys, up to their first slash, that no entry of the table speaks of."""
    heads = {key.partition("/")[0] for key in keys}
    return {h for h in heads if not any(re.fullmatch(pattern, h) for pattern in table)}


def figures(which: str) -> dict[str, str]:
    """Of a set, the keys that are compared with a figure of ``adapter.report``, and this figure."""
    return {
        key: meaning.removeprefix("report.")
        for key, meaning in ARRAYS[which].items()
        if re.fullmatch(r"report\.\w+", meaning)
    }
