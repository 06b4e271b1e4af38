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

Here are the keys of round one's sets and those that several methods share. The others stand in the
test of their method, as a literal ``TRACE_KEYS`` that is read from there: for each set "arrays" and
"hparams", as here.
"""

from __future__ import annotations

import re
from typing import Any

from tests.helpers.declared import declared

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
    "set-c": {
        "weights": "model: state_dict",
        "inputs": "stream: images, divided by 255",
        "labels": "none: no method sees them; lsa_train: piece",
        "hparams": "field: see HPARAMS",
        "source_outputs": "output: the model before wrapping",
        "outputs": "output: adapter(images)",
        "adapted": "state: param/<name>",
        "loss": "report.loss; lsa: the entropy of the outputs, lsa_train: piece",
        r"\d+": "piece: hebbian.delta",
        "first": "state: param/<name> after the first batch, and piece: hebbian.delta; lsa_train: "
        "none, a step earlier than what is compared",
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
        "source_mean": "source: layer_mean, L times D; foa_shift: feature_mean, the last D; "
        "dpcore: feature_mean; petta: class_mean",
        "source_std": "source: layer_std; foa_shift: none; dpcore: feature_std",
        "prompts_init": "wrap: draws=",
        "domain": "none: no method sees it",
        "entropy": "output: of the plain logits; COME: opinion entropy of them",
        "ema_probs": "state: update/ema_probs",
        r"logits|grad_of_mean": "piece: losses.opinion_entropy",
        "n_confident": "report.confident",
        "images": "stream: images, normalised by params; pieces_augmix: piece",
        "views": "wrap: augment=; pieces_augmix: piece",
        "marginal_entropy": "report.loss, of the last step; pieces_memo: piece",
        r"log_mean_prob|grad": "piece: losses.marginal_entropy",
        r"image_index|crop_top_left|flip|w|m|ops|levels|negate": "piece: augmix.view",
        "aug": "wrap: augment=",
        "n_kept": "report.selected",
        r"x|weight|bias|running_(mean|var)(_after)?|y_(eval|train)|probe": "piece: Iabn",
        r"grad_(x|weight)_train": "piece: Iabn",
        "final": "state: norm/<layer>.mean, .var; dda: output: adapter(images) of nn.Flatten()",
        r"(logits|image)_(original|projected)": "piece: join",
        r"(image_)?(entropy|confidence|var)_(sum|fuse)|sum": "piece: join",
        r"select_(entropy|confidence|var)(_index)?": "piece: join",
    },
    "set-e": {
        "weights": "model: state_dict",
        "inputs": "stream: images; bytes are divided by 255",
        "labels": "none: no method sees them",
        "hparams": "field: see HPARAMS",
        "source_outputs": "output: the model before wrapping; aetta: none, equal to logits",
        "decision_slack": "none: provenance",
        "logits": "output: adapter(images); piece: dropout_error; roid: none, of the outputs",
        "dropout_logits": "none: the estimate depends on them; piece: dropout_error",
        "dropout_masks": "wrap: draws=",
        "agreement": "output: health['dropout_agreement']",
        "entropy_of_mean": "output: health['dropout_entropy']",
        "softmax_mean": "none: nothing depends on it",
        "softmax_std": "none: nothing depends on it",
        "estimated_accuracy": "output: health['estimated_accuracy'], in percent",
        "reset_after": "output: health['action']",
        "true_accuracy": "none: no guard sees it",
        "aug": "wrap: augment=",
        r"loss(_(cls|ins|div))?": "report.loss, .classification, .instance, .diversity",
        "pseudo_labels": "output: labels of the batch",
        r"adapted(_after_step0)?": "state: param/<name>",
        "teacher_final": "state: update/teacher.<name>",
        "bn_student_final": "state: norm/<layer>.mean and .var",
        "bn_teacher_final": "state: update/teacher.<layer>.mean and .var",
        "opt": "state: optim/<name>.<slot>",
        "param_names": "report: list(adapter.parameters_adapted)",
        r"source_(inputs|labels)": "source: batches",
        "outputs": "output: adapter(images)",
        "outputs_own_source_mean": "output: adapter(images) with use_source_mean=True",
        "features": "output: what the classifier is fed",
        "center_after": "state: output/centre",
        "count_after": "state: output/count",
        "source_inputs": "source: batches",
        "source_mean": "source: feature_mean; pea: block_mean",
        "bn_final": "state: norm/<layer>.mean and .var",
        "entropy": "output: pea: report.entropy; else none, the counts depend on it",
        "adapted": "state: param/<name>",
        "adapted_after_step0": "state: param/<name>",
        "loss": "report.loss",
        r"(student|teacher)_(after_update0|final)": "state: param/<name>, update/teacher.<name>",
        r"bn_(student|teacher)_final": "state: norm/<layer>.mean and .var, of the teacher "
        "update/teacher.<layer>.mean and .var",
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
    "set-c": {
        r"kind|origin|torch_f32_vs_numpy_f64\..*": "none: provenance",
        r"model\..*": "model: see tests.helpers.traces_sheet",
        r"optimizer|lr": "field: of the host; lsa_train: piece",
        r"repo|commit": "none: provenance",
        "cases": "piece: hebbian.delta",
        r"hidden|feature_size|classes": "none: shapes say it",
    },
    "set-d": {
        "method": "wrap: recipe, or update and guard",
        r"repo|commit|weights_of|run_seed": "none: provenance",
        r"model\..*": "model: see tests.helpers.nets.trace_model",
        "optimizer.name": "field: optimizer",
        r"optimizer\.(lr|momentum|nesterov|weight_decay|betas)": "field: of the same name",
        r"mean|std|op_names": "piece: augmix.view",
        r"params\.(mean|std)": "wrap: mean, std; reservoir: source: style_net normalises by them",
        r"params\.(e_margin|margin_e0)": "field: entropy_margin * ln C",
        "params.d_margin": "field: redundancy_margin",
        "params.m0": "field: flip_weight",
        "params.p0": "field: penalty",
        "params.a0": "field: threshold",
        "params.r0": "field: keep_share",
        "params.r1": "field: keep_slope",
        "params.reset_before": "call: reset() before these batches",
        "K": "piece: losses.opinion_entropy",
        "params.steps": "field: steps",
        "params.num_prompts": "field: prompts",
        r"params\.(cma_version|numpy|constant_replaced)": "none: provenance",
        "params.bn": "wrap: norm; shot: none, in words",
        "params.theta": "field: pseudo_weight, 0 for the method shot_im",
        "params.beta": "field: pseudo_threshold",
        "params.trained": "field: params",
        r"iabn_k|eps|momentum": "piece: Iabn",
        "optimizer.betas": "field: betas",
        "params.memory_size": "field: memory_size",
        "params.temperature": "field: temperature",
        "params.configured_batch": "wrap: batch_size",
    },
    "set-e": {
        r"method|kind": "wrap: recipe or guard; piece",
        r"repo|commit|weights_of": "none: provenance",
        r"model\..*": "model: see tests.helpers.nets.trace_model",
        "optimizer.name": "field: optimizer",
        r"optimizer\.(lr|momentum|nesterov|weight_decay|betas)": "field: of the same name",
        r"params\.(teacher_momentum|temperature|neighbours|distance|steps)": "field: same name",
        r"params\.(contrast|supervision|view_order|variant)": "none: in words",
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
        "params.alpha": "field: momentum; ttaug: 1 - source_weight; rotta: batch_weight; "
        "pea: drift_rate",
        "params.momentum": "field: momentum; pea: rate",
        r"params\.(group_size|views)": "field: of the same name",
        r"params\.(temperature|probs_momentum|source_momentum|q)": "field: of the same name",
        "params.views": "field: views",
        "params.view_order": "none: said of augment=",
        "params.steps": "field: steps",
    },
}


for _file, _sets in declared("TRACE_KEYS").items():
    for _which, _kinds in _sets.items():
        for _table, _kind in ((ARRAYS, "arrays"), (HPARAMS, "hparams")):
            for _key, _meaning in _kinds.get(_kind, {}).items():
                _held = _table.setdefault(_which, {}).setdefault(_key, _meaning)
                assert _held == _meaning, f"{_file}: {_key} has another meaning elsewhere"


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
