"""The faults that `mutants` puts into the code: each one replacement of text, and who judges it."""

import shlex
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """One replacement of text."""

    name: str
    file: str
    """Below nexus_ds/, or below the repository."""
    old: str
    """Stands exactly once in the file."""
    new: str
    judges: str = ""
    """Tests below tests/ besides the mirroring file, options of pytest, and `slow` for those that
    start processes."""

    def path(self, tree: Path) -> Path:
        inside = tree / "nexus_ds" / self.file
        return inside if inside.is_file() else tree / self.file

    def tests(self, tree: Path) -> list[str]:
        """Return pytest's arguments; the mirroring file is one if it is there and none is named
        with a test's name."""
        words = shlex.split(self.judges)
        folder, _, name = self.file.rpartition("/")
        mirror = f"{folder}/test_{name}" if folder else f"test_{name}"
        named = [word for word in words if word.partition("::")[0].endswith(".py")]
        if (
            mirror not in [word.partition("::")[0] for word in named]
            and (tree / "tests" / mirror).is_file()
        ):
            named.insert(0, mirror)
        options = [word for word in words if word not in named and word != "slow"]
        return [f"tests/{word}" for word in named] + options

    def faulty(self, text: str) -> str:
        """Return the file's text with the fault; ValueError unless it has exactly one place."""
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, "
                "expected 1"
            )
        return text.replace(self.old, self.new)


FAULTS = (
    # nexus_ds/model
    Fault(
        "the gate stays fp32",
        "runtime/nexus_moe.py",
        "gate_TK.to(x.dtype).float()",
        "gate_TK.float()",
    ),
    Fault(
        "each pass has the whole of the router's losses",
        "runtime/nexus_moe.py",
        "load_balance, self.loss_scale * self.load_balance)",
        "load_balance, self.load_balance)",
    ),
    Fault(
        "balance counts a token's choices as one",
        "model/losses.py",
        "(tokens * top_k)",
        "tokens",
    ),
    Fault(
        "a spare row is an expert's own",
        "runtime/nexus_moe.py",
        "counts_E + 1)",
        "counts_E)",
    ),
    Fault("z-loss squares the mean", "model/losses.py", ".square().mean()", ".mean().square()"),
    Fault(
        "the centre is that of raw vectors",
        "checkpoint/expert_rows.py",
        "unit(vectors_EM).mean(0)",
        "vectors_EM.mean(0)",
        "upcycling/test_new_router.py",
    ),
    Fault(
        "balanced rows get the inverse length",
        "upcycling/new_router.py",
        "_scale_output(state, init_norm / norm)",
        "_scale_output(state, norm / init_norm)",
    ),
    Fault(
        "the last numbers that are drawn are not drawn again",
        "upcycling/new_router.py",
        "        _draw_groups(draws, drawn[-GROUP:])\n",
        "",
    ),
    Fault(
        "angles are radii",
        "upcycling/new_router.py",
        "np.multiply(radius, np.sin(angle), out=halves[:, 1])",
        "np.multiply(radius, np.cos(angle), out=halves[:, 1])",
    ),
    Fault(
        "weights of an adapter's base are taken for the merged ones",
        "checkpoint/tensors.py",
        "    MergedReader: MergedTensors,\n",
        "    MergedReader: TensorReader,\n",
        "checkpoint/test_adapters.py",
    ),
    Fault(
        "weights are hashed before a warm start changes them",
        "upcycling/new_checkpoint.py",
        "if text is None:\n                hashing.begin()",
        "if True:\n                hashing.begin()",
        "commands/test_upcycle.py",
    ),
    Fault(
        "two experts are averaged",
        "model/experts.py",
        "gate_TK[:, :, None]).sum(1)",
        "gate_TK[:, :, None]).mean(1)",
    ),
    Fault(
        "the loss head forgets the engine's factor",
        "model/head.py",
        "gradients[0] / len(hidden_grad_TH)",
        "1.0 / len(hidden_grad_TH)",
    ),
    Fault(
        "the dense average counts the first model alone",
        "upcycling/average.py",
        "tensors[name] = mean_of(parts)",
        "tensors[name] = mean_of(parts[:1])",
        "experiments/comparison/test_work.py",
    ),
    Fault(
        "added tokens are not copied", "checkpoint/tokenizer.py", '    "added_tokens.json",\n', ""
    ),
    Fault(
        "a tied output layer is left to the loader",
        "checkpoint/file_layout.py",
        "return {HEAD: EMBEDDING} if",
        "return {} if",
        "checkpoint/test_qwen2_moe.py",
    ),
    Fault(
        "a native form names a class that nobody has",
        "checkpoint/forms.py",
        'return f"Nexus{words}ForCausalLM"',
        'return f"{words}ForCausalLM"',
    ),
    Fault(
        "norms of a family's own places are left out",
        "checkpoint/dense_settings.py",
        "norms=family.norms,",
        'norms=("input_layernorm", "post_attention_layernorm"),',
        "checkpoint/test_native.py",
    ),
    Fault(
        "a warm start gives all layers what the first one is given",
        "warm_start/fit.py",
        "self.arguments[layer].items()",
        "self.arguments[0].items()",
    ),
    Fault(
        "a router that can't learn passes",
        "upcycling/upcycle.py",
        "if normed and alone:",
        "if normed and not alone:",
        "checkpoint/test_native.py",
    ),
    Fault(
        "RoPE turns heads in layers without it",
        "checkpoint/dense_settings.py",
        "tuple(family.turned_layers(values, types))",
        "(True,) * len(types)",
    ),
    Fault(
        "layers with a window take the RoPE of those without",
        "checkpoint/dense_settings.py",
        "own = dict(stated.get(kind) or",
        "own = dict(stated.get(FULL) or",
    ),
    Fault(
        "heads keep the order of the family's own file",
        "checkpoint/views.py",
        "            rows = rows[numbers - numbers % head + within - first]",
        "            rows = rows[numbers - first]",
    ),
    Fault(
        "Granite's attention multiplier is left out",
        "checkpoint/views.py",
        '        "q_proj": values["attention_multiplier"] * math.sqrt(settings.head_dim),',
        '        "q_proj": 1.0,',
    ),
    Fault(
        "a part of a fused tensor begins with the first row",
        "checkpoint/views.py",
        "        filled_rows[whole] = start + weight.shape[0]",
        "        filled_rows[whole] = start",
    ),
    Fault(
        "RoPE's factor is multiplied into all channels of a query",
        "checkpoint/views.py",
        "            scales[within < origin.turned] *= origin.turns",
        "            scales *= origin.turns",
    ),
    Fault(
        "two lists of longrope's factors are no reason for a note",
        "checkpoint/dense_settings.py",
        'and rope["short_factor"] != rope["long_factor"]:',
        'and not rope["short_factor"]:',
        "upcycling/test_new_checkpoint.py",
    ),
    Fault(
        "a range begins with the row that it begins in",
        "checkpoint/headers.py",
        "        position = (above + first) * width",
        "        position = first * width",
        "checkpoint/test_views.py",
    ),
    Fault(
        "the head of a model that sees is said to be tied",
        "checkpoint/wrappers.py",
        "bool(config.get(tied, wrapper.tied)) or",
        "bool(config.get(tied, True)) or",
    ),
    Fault(
        "an adapter of split projections is merged into rows of another order",
        "checkpoint/adapters.py",
        "        if not whole.reader.origins[name].as_it_is:",
        "        if not whole.reader.origins:",
    ),
    Fault(
        "a block within a row is multiplied by the factors of the first columns",
        "checkpoint/laid.py",
        "    begin = first % width\n",
        "    begin = 0\n",
        "checkpoint/test_laid.py",
    ),
    Fault(
        "heads are written without room for their gates",
        "checkpoint/laid.py",
        "2 * whole * self.head + done",
        "whole * self.head + done",
        "checkpoint/test_laid.py",
    ),
    Fault(
        "what lies in the mixture is not looked at before it is extended",
        "upcycling/compatible.py",
        'settings(config), None, names, "averaged")',
        'settings(config), None, [], "averaged")',
        "upcycling/test_assessment.py",
    ),
    Fault(
        "norms of heads are stored without the power of two of the other",
        "checkpoint/qwen3_next_headers.py",
        "_held(k_D / power_D - 1, dtype)",
        "_held(k_D - 1, dtype)",
    ),
    Fault(
        "rows of z stand before those of v in what a Qwen3.5 becomes",
        "checkpoint/qwen3_5.py",
        "        _Part(qkv, 2 * net.keys, values),\n        _Part(z, 0, values),\n",
        "        _Part(z, 0, values),\n        _Part(qkv, 2 * net.keys, values),\n",
    ),
    Fault(
        "a Qwen3.5's decays are written in the dtype of the other weights",
        "checkpoint/qwen2_moe.py",
        '"F32" if entry.fp32 or entry.role in full else dtype',
        '"F32" if entry.role in full else dtype',
        "checkpoint/test_qwen3_5.py slow",
    ),
    Fault(
        "the constant gate of a mixture in fp16 is written as the zero that fp16 has for it",
        "checkpoint/qwen2_moe.py",
        'full = {Role.SHARED_GATE} if dtype == "F16" else set()',
        "full: set[Role] = set()",
        "upcycling/test_upcycle.py",
    ),
    Fault(
        "an extension copies the constant gate as others saved it",
        "upcycling/new_checkpoint.py",
        "if entry.fill is not None:",
        "if False:",
    ),
    Fault(
        "rows of P(D) in fp16 are not rounded",
        "checkpoint/values.py",
        "return _fp16(x).astype(np.float32)",
        "return np.asarray(x, np.float32)",
    ),
    Fault(
        "small numbers of an average in fp16 are verified by a relative bound alone",
        "upcycling/verification.py",
        '"F16": 2.0**-24}',
        '"F16": 0.0}',
    ),
    Fault(
        "a Qwen3 in fp16 is multiplied by powers of two that fp16 rounds",
        "upcycling/upcycle.py",
        'if base.dtype == "F16" and',
        "if False and",
        "checkpoint/test_qwen3_next.py",
    ),
    Fault(
        "nobody looks at the output gate of a Qwen3-Next's last head",
        "checkpoint/qwen3_next_headers.py",
        "place.in_file(start), place.in_file(stop)",
        "place.in_file(start), place.in_file(stop - 1) + 1",
    ),
    Fault(
        "verify takes every row of a router for right",
        "upcycling/verification.py",
        "    for layer, difference in check.worst.items():",
        "    for layer, difference in ():",
    ),
    Fault(
        "a bad step counts as a good one",
        "runtime/bad_batches.py",
        "self.in_a_row + 1 if bad else 0",
        "0",
    ),
    Fault(
        "the gradient of the up projection is that of the gate",
        "model/experts.py",
        "        dup_NF = value_NF * dinner_NF",
        "        dup_NF = up_NF * dinner_NF",
    ),
    Fault(
        "the loss's gradient passes a cap of logits as it is",
        "model/scoring.py",
        "        error_cV *= slope_cV",
        "        error_cV *= 1",
    ),
    Fault(
        "Gemma's embeddings are not scaled",
        "checkpoint/native.py",
        "torch.full_like(embeddings.embed_scale, scale,",
        "torch.full_like(embeddings.embed_scale, 1.0,",
        "checkpoint/test_native.py -k gemma",
    ),
    Fault(
        "a GPU compiles the loss of however few words",
        "model/head.py",
        "hidden_TH.is_cuda and vocabulary >= COMPILED_FROM",
        "hidden_TH.is_cuda",
    ),
    Fault(
        "a regime shows each contender at its last setting, not at its best",
        "experiments/comparison/report_tables.py",
        "if mean < lowest.get(row.name, math.inf):",
        "if mean < math.inf:",
    ),
    Fault(
        "Cohere's logits are not multiplied",
        "model/head.py",
        " / getattr(config, FACTOR, 1.0)",
        "",
    ),
    Fault(
        "all experts are gated by SiLU",
        "checkpoint/build.py",
        "FeedForward(hidden_size, ffn_size, self.activation)",
        "FeedForward(hidden_size, ffn_size)",
        "checkpoint/test_native.py -k gemma",
    ),
    Fault(
        "a model caps the loss that it takes for logits",
        "model/head.py",
        "    setattr(config, CAP, None)",
        "    setattr(config, CAP, cap)",
    ),
    Fault(
        "perplexity is of logits that no cap has seen",
        "evaluation/passes.py",
        "finish.logits(head(hidden_TH[part]))",
        "head(hidden_TH[part])",
    ),
    Fault(
        "the router is compiled with the rest of its block",
        "model/compiled.py",
        "        yield shared if isinstance(shared, nn.Module) else part",
        "        yield part",
    ),
    Fault(
        "the router's file lies among the weights",
        "checkpoint/records.py",
        'ROUTER = "nexus/nexus_router.safetensors"',
        'ROUTER = "router.safetensors"',
        "checkpoint/test_sidecar.py",
    ),
    Fault(
        "transformers 4 is told a class of 5",
        "data/tokenizer.py",
        'return found | {"tokenizer_class": ANY_CLASS}',
        "return found",
    ),
    Fault(
        "a tokenizer's links are followed",
        "checkpoint/tokenizer.py",
        "copy_file(confined(source, name), ",
        "copy_file(source / name, ",
    ),
    Fault(
        "a fingerprint without weights",
        "checkpoint/sidecar.py",
        "digest.update(file.read(SAMPLE_BYTES))",
        "file.read(SAMPLE_BYTES)",
    ),
    Fault(
        "rows that are NaN agree",
        "checkpoint/sidecar.py",
        "if not difference <= TOLERANCE[dtype]",
        "if difference > TOLERANCE[dtype]",
    ),
    Fault(
        "removing keeps the first rows",
        "upcycling/remove.py",
        "read_floats(reader, name)[kept]",
        "read_floats(reader, name)[: len(kept)]",
        "upcycling/test_remove.py",
    ),
    Fault(
        "a trained gate of a shared expert is set back in silence",
        "upcycling/adopt.py",
        "if found.wrong and not approximate",
        "if False and not approximate",
        "upcycling/test_adopt.py",
    ),
    Fault(
        "P is fitted to rows by any matrix",
        "model/refit.py",
        "change_KH = inverse_KE @ missing_EH",
        "change_KH = read_EK.T @ missing_EH",
        "model/test_refit.py",
    ),
    Fault(
        "a chat's prompts are learned too",
        "data/chat.py",
        "inside = inside or first <= start < last",
        "inside = True",
        "data/test_chat.py",
    ),
    Fault(
        "the first id of a window is counted as its label",
        "data/corpora.py",
        "[1:].sum()",
        ".sum()",
        "data/test_chat.py",
    ),
    Fault(
        "any row of a new expert will do",
        "upcycling/extend.py",
        "> LARGEST_EMBEDDING * largest_old",
        "> 1e9 * largest_old",
        "upcycling/test_extend.py",
    ),
    Fault(
        "lambda counts one expert too many",
        "upcycling/extend.py",
        "return new / (old + new)",
        "return new / (old + new + 1)",
        "upcycling/test_extend.py",
    ),
    Fault(
        "TIES averages over all branches, not over those that have the elected sign",
        "checkpoint/merging.py",
        "divisor += np.float32(weight) * where",
        "divisor += np.float32(weight)",
        "checkpoint/test_merging.py",
    ),
    Fault(
        "DARE does not make good for what it loses",
        "checkpoint/merging.py",
        "            change /= np.float32(self.density)\n",
        "",
        "checkpoint/test_merging.py",
    ),
    Fault(
        "an expert's hash is taken over its tensors in file order",
        "upcycling/new_checkpoint.py",
        "for dense_name in sorted(names)]",
        "for dense_name in names]",
        "upcycling/test_new_checkpoint.py",
    ),
    Fault(
        "a merged block is written without its copies",
        "checkpoint/assembly.py",
        "(target, *target.copies)",
        "(target,)",
        "checkpoint/test_file_layout.py",
    ),
    Fault(
        "domain vectors in sorted order",
        "upcycling/blend.py",
        "embeddings.vector(name) for name in names]",
        "embeddings.vector(name) for name in sorted(names)]",
        "upcycling/test_upcycle.py",
    ),
    Fault(
        "code of a checkpoint is run",
        "checkpoint/build.py",
        "trust_remote_code=False,\n            use_safe",
        "trust_remote_code=True,\n            use_safe",
        "checkpoint/test_loading.py",
    ),
    Fault(
        "a new model has no grouped attention",
        "checkpoint/build.py",
        "num_key_value_heads=model.kv_heads or model.heads",
        "num_key_value_heads=model.heads",
    ),
    Fault(
        "scoring runs a checkpoint's own code",
        "checkpoint/loading.py",
        "            trust_remote_code=False,",
        "            trust_remote_code=True,",
    ),
    Fault(
        "a streamed layer keeps its weights",
        "checkpoint/streaming.py",
        '            block.to("meta")',
        "            pass",
    ),
    Fault(
        "page cache counts as taken memory",
        "checkpoint/room.py",
        "limit - usage + int(",
        "limit - usage + 0 * int(",
    ),
    Fault(
        "what is loaded is not asked of main memory",
        "checkpoint/needs.py",
        " and need.loading <= MARGIN * host",
        "",
    ),
    Fault(
        "a leak is the expert's own share",
        "evaluation/perplexity.py",
        "if domain != own]",
        "if domain == own]",
    ),
    Fault(
        "top-2 counts one idle expert more",
        "checkpoint/inspection.py",
        "routed * (len(experts) - top_k)",
        "routed * (len(experts) - 1)",
    ),
    Fault(
        "replacing changes the first vectors",
        "upcycling/replace.py",
        "vectors[list(places.values())] =",
        "vectors[: len(places)] =",
        "upcycling/test_replace.py",
    ),
    Fault(
        "means forget all but the last slice",
        "warm_start/methods.py",
        "        sum_H += x_tH.sum(",
        "        sum_H = x_tH.sum(",
    ),
    Fault(
        "whitening divides twice",
        "warm_start/methods.py",
        "values_H.mean()).sqrt()",
        "values_H.mean())",
    ),
    Fault(
        "gaps in a weight file pass",
        "checkpoint/headers.py",
        "if info.start != position:",
        "if info.start < position:",
    ),
    Fault(
        "a run fills its GPU to the brim",
        "planning/fitting.py",
        "machine.gpu_memory * (1 - SPARE)",
        "machine.gpu_memory",
    ),
    Fault(
        "a DeepSpeed JSON's stage is not kept",
        "planning/fitting.py",
        'if "stage" in zero:',
        "if False:",
    ),
    # nexus_ds/runtime
    Fault(
        "the rank with most memory decides",
        "runtime/loop.py",
        "(min(kind) for kind in",
        "(max(kind) for kind in",
    ),
    Fault(
        "an offloaded optimizer goes a tensor at a time",
        "runtime/engine.py",
        "if offload or not internals.on_cpu():",
        "if not internals.on_cpu():",
    ),
    Fault(
        "the loop is a step late in the schedule",
        "runtime/loop.py",
        "learning_rate(step, self.config.training",
        "learning_rate(max(step - 1, 0), self.config.training",
    ),
    Fault(
        "ranks start a micro-batch apart",
        "runtime/loop.py",
        "self.rank * share + part",
        "self.rank * micro + part",
    ),
    Fault(
        "validation repeats its first windows",
        "runtime/loop.py",
        "(turn * self.world + self.rank) * batch",
        "self.rank * batch",
        "runtime/test_loop.py -k validation slow",
    ),
    Fault(
        "an idle rank's pass counts",
        "runtime/loop.py",
        "if not idle:",
        "if True:",
        "runtime/test_loop.py -k validation slow",
    ),
    Fault(
        "validation reads what was trained on",
        "runtime/loop.py",
        'validation_domains, "validation"',
        'validation_domains, "train"',
        "runtime/test_loop.py -k validation slow",
    ),
    Fault(
        "tokens count for a neighbour's domain",
        "runtime/tally.py",
        "selected_TK.view(sequences, -1, 1)",
        "selected_TK.view(-1, sequences, 1).transpose(0, 1)",
    ),
    Fault(
        "weight decay may change on resume",
        "settings.py",
        'weight_decay: float = setting(\n        0.1,\n        changes="course"',
        'weight_decay: float = setting(\n        0.1,\n        changes="execution"',
        "runtime/test_loop.py",
    ),
    Fault(
        "the order of domains may change on resume",
        "runtime/states.py",
        "json.dumps(saved[key]) != json.dumps(now[key])",
        "saved[key] != now[key]",
        "runtime/test_loop.py",
    ),
    Fault(
        "each rank hashes the first files",
        "runtime/states.py",
        "sorted(files)[share::of]",
        "sorted(files)[:: max(of, 1)]",
    ),
    Fault(
        "a farewell is a loss",
        "runtime/watchdog.py",
        "if self.left is not None:",
        "if self.left:",
    ),
    Fault(
        "a rank that stands still has all the time",
        "runtime/watchdog.py",
        "silent > SILENCE * limit",
        "silent > 60 * limit",
    ),
    Fault(
        "the farthest is named first",
        "runtime/watchdog.py",
        "return idle, place.number, doing",
        "return idle, -place.number, doing",
    ),
    Fault(
        "a suspended job is ended",
        "runtime/watchdog.py",
        "            self.forgiven = min(now",
        "            return 'rank 1 is silent'\n            self.forgiven = min(now",
    ),
    Fault(
        "domains that are only scored are not tokenised",
        "data/preparation.py",
        "(data.domains, data.validation_domains)",
        "(data.domains, data.domains)",
    ),
    Fault(
        "P is among the matrices",
        "runtime/engine.py",
        '        return part\n    kind = "matrices"',
        '        return "matrices"\n    kind = "matrices"',
    ),
    Fault(
        "the router is decayed",
        "runtime/engine.py",
        'undecayed = {"router"}',
        "undecayed = set()",
    ),
    Fault(
        "frozen experts decay",
        "runtime/engine.py",
        'undecayed.add("ffn")',
        'undecayed.add("shared")',
        "runtime/test_frozen_experts.py",
    ),
    Fault(
        "each rank freezes the experts of the first",
        "runtime/frozen_experts.py",
        "layer.placement.local_experts()",
        "range(layer.placement.local_slots)",
    ),
    Fault(
        "free rows learn as slowly as P",
        "runtime/engine.py",
        "1.0 if linear else config.router.lr_scale",
        "config.router.lr_scale",
    ),
    Fault(
        "a group's scale is forgotten", "runtime/engine.py", 'lr * group.get("lr_scale", 1.0)', "lr"
    ),
    Fault(
        "the anneal starts from the peak",
        "runtime/schedule.py",
        "_cosine(end, training.anneal_lr,",
        "_cosine(training.lr, training.anneal_lr,",
    ),
    Fault(
        "an export is checked with a graph that keeps all of its layers",
        "runtime/export_check.py",
        "# a graph would keep every layer that was read\n@torch.no_grad()\n",
        "",
    ),
    Fault(
        "a layer of an export may differ by what a wrong expert does",
        "runtime/export_check.py",
        "torch.bfloat16: Bounds(2.0**-4,",
        "torch.bfloat16: Bounds(2.0**0,",
    ),
    Fault(
        "an export lets tokens take other experts far from a tie",
        "runtime/export_check.py",
        "if far or flips",
        "if flips",
    ),
    Fault(
        "an export's tensors are counted and not compared",
        "runtime/export_check.py",
        "if expected.get(name) != found.get(name)]",
        "if (name in expected) != (name in found)]",
    ),
    Fault(
        "the time left counts from step 0",
        "runtime/metrics.py",
        "done = step - self.first",
        "done = step",
    ),
    # nexus_ds/data
    Fault(
        "validation files hold training text",
        "data/corpora.py",
        "self.source, list(named), self.split,",
        'self.source, list(named), "train",',
    ),
    Fault(
        "the cap cuts validation text",
        "data/corpora.py",
        'max_bytes if split == "train" else 0',
        "max_bytes",
    ),
    Fault(
        "every epoch has the same order",
        "data/mixture.py",
        '{self.domains[domain]} {epoch}"',
        '{self.domains[domain]}"',
    ),
    Fault(
        "text can end a document",
        "data/encoding.py",
        "backend.encode_special_tokens = True",
        "backend.encode_special_tokens = False",
        "data/test_corpora.py",
    ),
    Fault(
        "an encoder's own code is run",
        "data/sentence_encoder.py",
        "            trust_remote_code=False,",
        "            trust_remote_code=True,",
    ),
    Fault(
        "an encoder's missing weights are filled at random",
        "data/sentence_encoder.py",
        "    if drawn:",
        "    if False:",
    ),
    Fault(
        "an encoder names a kernel of the hub",
        "data/encoder_checks.py",
        "        if key not in TRUSTED_ONLY:",
        "        if False:",
    ),
    Fault(
        "an encoder's shards lie elsewhere",
        "data/encoder_checks.py",
        "            _check_index(file)",
        "            pass",
    ),
    Fault(
        "a small domain has no validation text",
        "data/clusters.py",
        "from_bytes(digest) % places",
        "from_bytes(digest) % self.every",
    ),
    Fault(
        "rows are numbered within their table", "data/hub.py", "{start + int(row)}", "{int(row)}"
    ),
    Fault(
        "a cap counts characters",
        "data/rows.py",
        "self.left -= len(content)",
        "self.left -= len(document.text)",
    ),
    # what strangers and full disks say, and what is said of them
    Fault(
        "a stranger's line end begins a line",
        "console.py",
        '" ".join(filter(None, str(text).splitlines()))',
        "str(text)",
        "commands/test_inspect_model.py report/test_page.py",
    ),
    Fault(
        "a secret of the environment stands in a card",
        "checkpoint/model_card.py",
        '*card.parts]) + "\\n"',
        '*card.parts]) + __import__("os").environ.get("HF_TOKEN", "") + "\\n"',
        "faults/test_audit.py slow",
    ),
    Fault(
        "half a character reaches a terminal",
        "console.py",
        r"\x9f\ud800-\udfff]",
        r"\x9f]",
        "commands/test_evaluate.py",
    ),
    Fault(
        "C1 controls reach a terminal",
        "console.py",
        r"\x7f-\x9f",
        r"\x7f",
    ),
    Fault(
        "half a character ends a card in a traceback",
        "outputs.py",
        'text.encode("utf-8", errors="backslashreplace")',
        'text.encode("utf-8")',
        "checkpoint/test_model_card.py",
    ),
    Fault(
        "a name is drawn as a formula",
        "report/figures.py",
        r'DOLLAR.sub(r"\\$", visible(name))',
        "visible(name)",
    ),
    Fault(
        "names at ticks are drawn as formulas",
        "report/figures.py",
        "if isinstance(tell, FuncFormatter):",
        "if False:",
    ),
    Fault(
        "no output's writer is told with its job",
        "outputs.py",
        'f" in {job}" if job else ""',
        '""',
    ),
    Fault(
        "a full disk is told of the file that was read",
        "outputs.py",
        "write_at(new.fileno(), done, block[:count], target, left)",
        "write_at(new.fileno(), done, block[:count], source, left)",
    ),
    Fault(
        "a copy that does not fit needs one block",
        "outputs.py",
        "left = max(size - done - count, 0)",
        "left = 0",
    ),
    Fault(
        "the half of latest stays behind a kill",
        "runtime/states.py",
        "    _remove_partial(states)\n    if states.is_dir():",
        "    _remove_partial(states)\n    if False:",
        "runtime/test_states_kills.py slow",
    ),
    Fault(
        "hooks in lists are not looked for",
        "code_hooks.py",
        'yield from walk(item, f"{path}{index}.")',
        "yield from ()",
    ),
    Fault(
        "any package's version will do",
        "runtime/installed.py",
        "    if any(problems):",
        "    if False:",
    ),
    Fault(
        "a newer package ends a training",
        "runtime/installed.py",
        'if one.operator == ">="',
        "if True",
    ),
    Fault(
        "`no` is False, as in YAML 1.1",
        "config.py",
        'r"true|True|TRUE|false|False|FALSE", "tTfF"',
        'r"true|True|TRUE|false|False|FALSE|no", "tTfFn"',
    ),
    Fault(
        "017 is a number",
        "config.py",
        'r"0|-?[1-9][0-9]*"',
        'r"0|-?[0-9]+"',
    ),
    Fault(
        "any process may be outlived",
        "children.py",
        "if _is_runner(runner):",
        "if True:",
    ),
    Fault(
        "a deepspeed that is killed leaves its ranks",
        "children.py",
        "while _parent_of(parent) == runner:",
        "while True:",
    ),
    Fault(
        "an encoder names other files",
        "data/encoder_checks.py",
        "if key in FILES and value:",
        "if False:",
    ),
    Fault(
        "an encoder's modules lie elsewhere",
        "data/encoder_checks.py",
        'if path.is_absolute() or ".." in path.parts:',
        "if path.is_absolute():",
    ),
    Fault(
        "an encoder has a module of any kind",
        "data/encoder_checks.py",
        "if kind_of(module) not in KINDS:",
        "if False:",
    ),
    Fault(
        "an encoder's options are handed on unread",
        "data/encoder_checks.py",
        "if key in OPTIONS and value and not (isinstance(value, dict) and set(value) <= KNOWN):",
        "if False:",
    ),
    Fault(
        "an encoder builds what is not stored",
        "data/encoder_checks.py",
        "if math.prod(largest) > size:",
        "if False:",
    ),
    Fault(
        "an encoder has layers without end",
        "data/encoder_checks.py",
        "(largest := max(_numbers(config, keys), default=0)) > most",
        "(largest := max(_numbers(config, keys), default=0)) < 0",
    ),
    Fault(
        "an encoder's second transformer is made",
        "data/encoder_checks.py",
        "if modules and (kinds.count(TRANSFORMER), kinds[0]) != (1, TRANSFORMER):",
        "if False:",
    ),
    Fault(
        "an adapter is read as a whole encoder",
        "data/encoder_checks.py",
        "if file.name == ADAPTER:",
        "if False:",
    ),
    # nexus_ds/comparison
    Fault(
        "a mixture costs as little as a dense model",
        "experiments/comparison/recipe_reader.py",
        "token_flops(sizes, config.data",
        "token_flops(replace(sizes, experts=0), config.data",
        "experiments/comparison/test_method_jobs.py",
    ),
    Fault(
        "the budget has one branch",
        "experiments/comparison/recipe_reader.py",
        "(branch, len(branch.pipeline.domains))",
        "(branch, 1)",
        "experiments/comparison/test_method_jobs.py",
    ),
    Fault(
        "untrained is trained",
        "experiments/comparison/results.py",
        "first = _validation(scored[0])",
        "first = _validation(scored[-1])",
        "commands/test_compare.py",
    ),
    Fault(
        "the posterior is one over tokens",
        "experiments/comparison/ensemble.py",
        "before_NWT.log_softmax(0)",
        "before_NWT.log_softmax(-1)",
    ),
    # nexus_ds/planning
    Fault(
        "logits are half as large",
        "planning/memory.py",
        "assume.LOGITS_BYTES * logits",
        "4 * logits",
    ),
    Fault(
        "offloaded gradients take no host memory",
        "planning/memory.py",
        "beside = FP32 + width",
        "beside = width",
    ),
    Fault(
        "what ZeRO-3 keeps gathered is free",
        "planning/memory.py",
        "width * (live_elements(sizes, layout) + gathered)",
        "width * gathered",
    ),
    Fault(
        "all experts are active",
        "planning/traffic.py",
        'counts["active"] - (0',
        'counts["total"] - (0',
    ),
    Fault(
        "host memory never runs out",
        "planning/choose.py",
        " and needs.host_bytes <= host_memory",
        "",
    ),
    # nexus_ds/report
    Fault(
        "losses under the head of perplexities",
        "report/evaluation.py",
        '"loss_nats", "perplexity"',
        '"perplexity", "loss_nats"',
    ),
    Fault(
        "every domain shows the largest gate",
        "report/evaluation.py",
        "float(gate_D[d])",
        "float(gate_D.max())",
    ),
    Fault(
        "gate and own share change places",
        "experiments/comparison/report_tables.py",
        "                own,\n                gate,\n",
        "                gate,\n                own,\n",
    ),
    Fault(
        "before and after change places",
        "experiments/comparison/report_tables.py",
        "for side in (before, after)",
        "for side in (after, before)",
    ),
    Fault("a limit of 3% is 300%", "report/verdict.py", "float(match[1]) / 100", "float(match[1])"),
    Fault(
        "cells are not escaped",
        "report/page.py",
        "html.escape(format_cell(value))",
        "format_cell(value)",
    ),
    # nexus_ds/benchmarks
    Fault(
        "a part of a block counts twice",
        "experiments/benchmarks/parts.py",
        "block - sum(inside)",
        "block",
    ),
    Fault(
        "slower is faster",
        "experiments/benchmarks/layer_speed.py",
        "base / own for base, own in",
        "own / base for base, own in",
    ),
    Fault(
        "links have no delay",
        "experiments/benchmarks/network.py",
        "(time.monotonic() + delay, frame)",
        "(time.monotonic(), frame)",
    ),
    # export
    Fault(
        "an export looks at the engine with its dropout",
        "runtime/export.py",
        "        engine.module.eval()\n",
        "",
        "runtime/test_export_check.py",
    ),
    Fault(
        "a layer's sum may not be rounded once more",
        "runtime/export_check.py",
        "rounded_S = self.bounds.rounding * engine_SH.norm(dim=-1)",
        "rounded_S = 0 * engine_SH.norm(dim=-1)",
    ),
    Fault(
        "a rank with nothing to do is named first",
        "runtime/watchdog.py",
        "idle = math.isinf(place.patience)",
        "idle = False",
    ),
    Fault(
        "a part of a layer's arguments stays on the host",
        "checkpoint/streaming.py",
        "    return value.to(place)\n",
        "    return value\n",
        "devices/test_streaming.py",
    ),
    # nexus_ds/serving
    Fault(
        "what a program computes wrongly is written for it",
        "serving/exporting.py",
        "    refuse_unservable(target, opened.mixture, str(checkpoint))\n",
        "",
    ),
    Fault(
        "windows in some layers are no reason for vLLM",
        "serving/targets.py",
        '        Rule(_SOME_WINDOWS, "gives no layer a window"),\n',
        "",
    ),
    Fault(
        "rows that are not P(D) are exported",
        "serving/directory.py",
        "    verify_expert_embeddings(directory)\n",
        "",
    ),
    Fault(
        "an export is not read again",
        "serving/directory.py",
        "    check_weights(opened, out, plan)\n",
        "",
    ),
    Fault(
        "an expert that goes further takes the seed with its whole weight",
        "upcycling/blend.py",
        "entry.dense_name, 1.0 - task)",
        "entry.dense_name, 1.0)",
        "upcycling/test_upcycle.py",
    ),
    Fault(
        "any model passes for the seed of experts that go further",
        "upcycling/extend.py",
        "    problems.refuse()\n    return models[",
        "    return models[",
        "upcycling/test_upcycle.py",
    ),
    Fault(
        "a comparison extends without the seed",
        "experiments/comparison/extension_jobs.py",
        "jobs.seed_model() if config.model.task_scale != 1.0 else None",
        "None",
    ),
    Fault(
        "an export has no tokenizer",
        "serving/directory.py",
        "    copy_tokenizer(opened.directory, out)\n",
        "",
    ),
    Fault(
        "vLLM's biases are left as they come out of memory",
        "serving/directory.py",
        "    return _biases(mixture.sizes) if hard_coded and",
        "    return _biases(mixture.sizes) if not hard_coded and",
    ),
    Fault(
        "the cache of transformers 4 is used for a Qwen3-Next",
        "serving/directory.py",
        "    wrong = windows or next_without_linear(mixture)",
        "    wrong = windows",
    ),
    Fault(
        "a longrope's factor is left to the program",
        "serving/directory.py",
        '    if target.name in ("vllm", "sglang"):',
        '    if target.name in ("vllm",):',
    ),
    Fault(
        "the shared expert is twice as large in GGUF",
        "serving/gguf_file.py",
        "        whole = whole / np.float32(entry.scale)\n",
        "",
    ),
    Fault(
        "experts are stacked from the last in GGUF",
        "serving/gguf_file.py",
        "for expert in range(experts))",
        "for expert in reversed(range(experts)))",
    ),
    Fault(
        "llama3's factors multiply frequencies in GGUF",
        "serving/gguf_file.py",
        "return (1 / speed_D)",
        "return speed_D",
    ),
    Fault(
        "RoPE has llama.cpp's own base",
        "serving/gguf_file.py",
        '"rope.freq_base": float(sizes.rope["rope_theta"])',
        '"rope.freq_base": 10000.0',
    ),
    Fault(
        "RoPE of layers with a window has llama.cpp's own base",
        "serving/gguf_file.py",
        '"rope.freq_base_swa": float(sizes.rope["rope_theta"])',
        '"rope.freq_base_swa": 10000.0',
    ),
    Fault(
        "a stretched RoPE is not stretched in GGUF",
        "serving/gguf_file.py",
        'if mixture.rope in ("linear", "yarn"):',
        'if mixture.rope == "yarn":',
    ),
    Fault(
        "llama.cpp renormalises gates",
        "serving/gguf_file.py",
        '"expert_weights_norm": False',
        '"expert_weights_norm": True',
    ),
    Fault(
        "the router of a GGUF file is quantised with the rest",
        "serving/gguf_file.py",
        "Entry(entry.shape, (name,), full=True)",
        "Entry(entry.shape, (name,))",
    ),
    Fault(
        "a GGUF file is not read again",
        "serving/gguf_file.py",
        "    _check(gguf, opened, table, path)\n",
        "",
    ),
    Fault(
        "a GGUF file has no chat template",
        "serving/gguf_words.py",
        "        template=_template(directory),",
        '        template="",',
    ),
    Fault(
        "a text's BOS is left out in GGUF",
        "serving/gguf_words.py",
        "        begins=bool(opening),",
        "        begins=False,",
    ),
    Fault(
        "pieces in any order are taken for SentencePiece's",
        "serving/gguf_words.py",
        "        _check_order(directory, merges, vocab)\n",
        "",
    ),
    Fault(
        "Ollama's template is tried on no talk",
        "serving/modelfile.py",
        "    for trial in TRIALS:",
        "    for trial in ():",
    ),
    Fault(
        "an answer of Ollama ends with the text's end alone",
        "serving/modelfile.py",
        '        stops += [end] if end not in ("", *stops) else []\n',
        "",
    ),
    Fault(
        "a local path is shown on the hub",
        "serving/hub.py",
        "    refuse_local_paths(out)\n",
        "",
    ),
    Fault(
        "vLLM is told of families that it has",
        "serving/vllm_plugin.py",
        "        if not family.mixture and",
        "        if family.mixture and",
    ),
    Fault(
        "in vLLM the running mean is over the layer's window",
        "serving/vllm_context.py",
        "        whole.sliding_window = None\n",
        "",
    ),
    Fault(
        "in vLLM each rank takes the first heads",
        "serving/vllm_context.py",
        "get_tensor_model_parallel_rank() * self.width",
        "0 * self.width",
    ),
    Fault(
        "vLLM computes Gemma's experts with SiLU",
        "serving/vllm_plugin.py",
        ' and family.activations[0] == "silu":',
        ":",
    ),
    # chats are scored by their answers
    Fault(
        "prompts of chats are scored, too",
        "evaluation/passes.py",
        "targets_WS.flatten().clamp(min=NO_LABEL)",
        "unmarked(targets_WS).flatten()",
        "evaluation/test_perplexity.py",
    ),
    Fault(
        "windows of chats count the same",
        "evaluation/perplexity.py",
        "np.average(loss_W, weights=labels_W)",
        "np.average(loss_W)",
    ),
    Fault(
        "a verdict forgets how many answer tokens a window has",
        "report/verdict.py",
        "        labels_W = labels.get(domain)",
        "        labels_W = None",
    ),
    Fault(
        "remove reads chats as plain text",
        "commands/remove.py",
        "domains, args.windows, bos, args.chat)",
        "domains, args.windows, bos)",
        "test_chat_scores.py",
    ),
    # verbs, settings
    Fault(
        "a base wins over what is laid on it",
        "config.py",
        "return below | above | both",
        "return above | below | both",
        "test_recipes.py",
    ),
    Fault(
        "two tokenizers are one", "commands/evaluate.py", "if len(texts) > 1:", "if len(texts) > 2:"
    ),
    Fault(
        "a tie is an answer",
        "evaluation/documents.py",
        "nats_PC[:, 0] < nats_PC[:, 1:]",
        "nats_PC[:, 0] <= nats_PC[:, 1:]",
    ),
    Fault(
        "a document's pieces share no token",
        "evaluation/documents.py",
        "start + reader.length + 1]",
        "start + reader.length]",
    ),
    Fault(
        "the jackknife has the other sign",
        "evaluation/distance.py",
        "(without_D.mean() - without_D)",
        "without_D",
    ),
    Fault(
        "the first documents are the sample",
        "data/held_out.py",
        "int(generator.integers(seen + 1))",
        "count",
    ),
    Fault(
        "a prompt may outgrow the model",
        "generation/continuation.py",
        "min(self.room, limit - self.prompt)",
        "self.room",
    ),
    Fault(
        "prompts of a batch share their draws",
        "generation/drawing.py",
        "(seed + row) % SEEDS",
        "seed % SEEDS",
    ),
    Fault(
        "the token that reaches p is left out",
        "generation/drawing.py",
        "before_BV < drawing.top_p",
        "before_BV + sorted_BV < drawing.top_p",
    ),
    Fault(
        "a token is shown with its neighbour's route",
        "generation/continuation.py",
        "self.decisions += decisions[-left:]",
        "self.decisions += decisions[:left]",
    ),
    Fault(
        "the last tokens stand where padding is",
        "generation/continuation.py",
        "position_ids=real_B1 - 1,",
        "position_ids=torch.full_like(real_B1, length - 1),",
    ),
    Fault(
        "a shown expert is the last that was chosen",
        "generation/routes.py",
        "expert_T = chosen_TK[:, 0]",
        "expert_T = chosen_TK[:, -1]",
    ),
    Fault(
        "half a character is told",
        "generation/pieces.py",
        "if text.endswith(UNFINISHED) and not unfinished:",
        "if False:",
    ),
    Fault(
        "what is there is made again",
        "pipeline.py",
        "not in wanted and not by_name[other].output.exists()",
        "not in wanted",
    ),
    Fault(
        "an array task takes its neighbour's domain",
        "commands/stage.py",
        "return domains[int(text)]",
        "return domains[int(text) - 1]",
    ),
    Fault(
        "the time left is that of the whole run",
        "commands/status.py",
        "pace * (total - done)",
        "pace * total",
    ),
    # waits, and devices, on the pretend GPU
    Fault(
        "the host waits for its tokens to be copied",
        "runtime/deepspeed_internals.py",
        "tensor.pin_memory().to(device(), non_blocking=True)",
        "tensor.to(device())",
        "devices/test_training.py -k copies_its",
    ),
    Fault(
        "order is counted on the host",
        "model/experts.py",
        "torch.arange(len(self.order_N), device=self.order_N.device)",
        "torch.arange(len(self.order_N))",
        "devices/test_training.py -k loop_over",
    ),
    Fault(
        "a rank that sees one GPU wants another",
        "launch.py",
        "return 0 if visible == 1 else local_rank(env)",
        "return local_rank(env)",
    ),
    # slurm
    Fault(
        "one task too many",
        "slurm/pipeline.sh",
        '--array="0-$((count - 1))"',
        '--array="0-$count"',
        "slurm/test_injection.py -k pipeline",
    ),
    Fault(
        "a stop in order is a failure",
        "slurm/common.sh",
        "*75 | *138 | *143 |",
        "*138 | *143 |",
        "slurm/test_injection.py -k requeue",
    ),
    # Packages: cards, adapters, model cards
    Fault(
        "a card of other weights is taken",
        "checkpoint/cards.py",
        "card.ffn_sha256 != sha256",
        "card.ffn_sha256 == ''",
    ),
    Fault(
        "cards of different encoders go together",
        "checkpoint/cards.py",
        "if len(encoders) > 1:",
        "if len(encoders) > 99:",
    ),
    Fault(
        "the text of a card that covers several domains is not weighted",
        "checkpoint/cards.py",
        "np.float32(share) * embeddings",
        "np.float32(1.0) * embeddings",
    ),
    Fault(
        "an adapter's rank is not stabilised",
        "checkpoint/adapters.py",
        "alpha / math.sqrt(rank) if",
        "alpha / rank if",
    ),
    Fault(
        "an adapter is merged without the base's own weight",
        "checkpoint/adapters.py",
        "rows = rows + read_rows(self.base, name, start, stop)",
        "rows = 1 * rows",
    ),
    Fault(
        "a merged tensor is placed where the base's lies",
        "checkpoint/adapters.py",
        ", start=-1, end=-1)",
        ")",
    ),
    Fault(
        "an adapter of a tied head is merged",
        "checkpoint/adapters.py",
        "if tied and base.settings.tied_embeddings:",
        "if tied and not base.settings:",
    ),
    Fault(
        "background goes to the farthest domain",
        "warm_start/fit_text.py",
        "picked_n = cosines_EN[number].topk(",
        "picked_n = (-cosines_EN[number]).topk(",
        "commands/test_card.py",
    ),
    Fault(
        "a license that one part does not state is the whole's",
        "checkpoint/model_card.py",
        'if not stated or "" in stated:',
        "if not stated:",
    ),
    Fault(
        "the embedding of another text is taken for a branch's card",
        "runtime/domain_card.py",
        "if same and set(config.data.domains)",
        "if set(config.data.domains)",
    ),
)
