"""What is promised of reliability and security, and which tests hold it: one table.

    python tests/promises.py run [pytest's options]    runs them, keeps the results, writes the page
    python tests/promises.py page                      writes docs/reliability.md

The first is make test-faults. Results stand in tests/promises.json, figures of the last soak and of
fuzzing in soak.txt and fuzz.txt.
"""

import ast
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from datetime import date
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
RESULTS = TESTS / "promises.json"


class Promise(NamedTuple):
    """A sentence, its tests (`file::function` under tests/), and what they leave open."""

    name: str
    words: str
    tests: tuple[str, ...]
    open: str = ""


SOAK = "faults/test_soak.py::test_a_run_under_faults_ends_with_the_bits_of_an_undisturbed_one"
ONE = "faults/test_one_run.py::"
HEAP = ONE + "test_signals_in_a_heap_make_one_save_and_secrets_and_files_stay_closed"
AGAIN = ONE + "test_a_state_that_is_damaged_is_saved_again_under_its_name"
STATES = "runtime/test_states.py::"
KILLS = "runtime/test_states_kills.py::"
RESUMED = "runtime/test_loop_resumed.py::"
LAYOUTS = "runtime/test_states_layouts.py::"
WATCHDOG = "runtime/test_watchdog.py::"
SURVIVAL = "slurm/test_survival.py::"
INJECTION = "slurm/test_injection.py::"
MIXTURE = "data/test_mixture.py::"
ROWS = "data/test_rows.py::"
BLEND = "upcycling/test_blend.py::"
HEADERS = "checkpoint/test_headers.py::"
TOKENIZER = "checkpoint/test_tokenizer.py::"
LOADING = "checkpoint/test_loading.py::"
CONFIG = "test_config.py::"
AUDIT = "faults/test_audit.py::"
OUTSIDE = "faults/test_outside_files.py::"
OUTPUTS = "test_outputs.py::"
INSTALLED = "runtime/test_installed.py::"

PROMISES = (
    Promise(
        "T1",
        "SIGUSR1 ahead of a time limit: the state is saved at the end of the step, the job is"
        " requeued, and the resumed run ends with bit-equal weights.",
        (
            SOAK,
            SURVIVAL + "test_a_run_hit_by_everything_ends_with_the_weights_of_an_undisturbed_one",
            SURVIVAL + "test_the_time_limit",
        ),
    ),
    Promise(
        "T2",
        "SIGTERM to one rank alone: all ranks agree to save and stop.",
        ("test_train.py::test_a_run_that_is_stopped_goes_on_to_bit_equal_weights", SOAK),
    ),
    Promise("T3", "Many signals, also during a save: one save, one message.", (HEAP,)),
    Promise(
        "T4",
        "A kill while a state is being saved, also one that SIGUSR1 asked for and that takes longer"
        " than the grace: the state before stays, and the run resumes from it.",
        (
            RESUMED + "test_a_save_that_takes_longer_than_the_grace_leaves_the_state_before",
            KILLS + "test_a_killed_save_leaves_a_state_that_resumes",
            SOAK,
        ),
    ),
    Promise(
        "T5",
        "A requeue that fails, or has no scontrol: the command is named, the state kept.",
        (
            INJECTION + "test_a_failing_requeue_keeps_the_state_and_says_so",
            INJECTION + "test_a_machine_without_scontrol_is_named_before_anything_starts",
        ),
    ),
    Promise(
        "T6",
        "Restarts without progress end after three.",
        (
            SURVIVAL + "test_no_progress_stops_the_requeues",
            INJECTION + "test_progress_of_other_jobs_requeues_no_failure",
        ),
    ),
    Promise(
        "T7",
        "kill -9 of a rank: the others name it and end; the run resumes bit for bit.",
        (
            WATCHDOG + "test_a_rank_that_is_killed_ends_the_others_at_once",
            "faults/test_training.py::"
            "test_a_launcher_that_is_killed_takes_its_ranks_along_and_the_run_goes_on",
            "faults/test_training.py::test_a_deepspeed_that_is_killed_takes_its_ranks_along",
            SOAK,
        ),
        "Of `deepspeed` over several nodes (pdsh, mpirun) kill the launchers of the nodes too; and"
        " one that is killed in its first seconds, before its ranks look for it.",
    ),
    Promise(
        "T8",
        "kill -9 of a rank while its file is half written: the half is ignored, then removed.",
        (
            KILLS + "test_a_killed_save_leaves_a_state_that_resumes",
            KILLS + "test_a_kill_of_another_rank_leaves_a_good_state",
        ),
    ),
    Promise(
        "T9",
        "kill -9 of rank 0 at each point of a save: the next start takes the newest whole state.",
        (KILLS + "test_a_kill_at_any_point_of_a_save_leaves_a_good_state",),
    ),
    Promise("T10", "A damaged state in the place of the next one: it is saved again.", (AGAIN,)),
    Promise(
        "T11",
        "A rank that stands still is named within the limit, with phase and stacks, and all end.",
        (
            WATCHDOG + "test_a_training_whose_rank_stands_still_ends_and_keeps_its_state",
            WATCHDOG + "test_a_rank_that_stands_still_ends_the_run_within_the_limit",
            WATCHDOG + "test_a_rank_whose_main_thread_is_stuck_is_named_and_shows_where",
            WATCHDOG + "test_a_rank_that_stands_still_before_it_comes_is_named_within_the_limit",
            WATCHDOG + "test_a_store_that_does_not_answer_keeps_no_rank",
            SOAK,
        ),
        "Of a rank that never came to the start the others know no phase; where rank 0 or torchrun"
        " stands still while the ranks come, the address of the store.",
    ),
    Promise(
        "T12",
        "An error of one rank while it reads a batch: all end, and its own traceback is the first.",
        (ONE + "test_an_error_while_a_batch_is_read_stands_before_what_the_others_say",),
    ),
    Promise(
        "T13",
        "A truncated file of the newest state: named, and the state before is taken by all ranks.",
        (STATES + "test_damage_is_named_and_the_newest_good_state_is_taken", AGAIN, SOAK),
    ),
    Promise(
        "T14",
        "A flipped bit in any file of a state, its manifest included: likewise.",
        (
            STATES + "test_damage_is_named_and_the_newest_good_state_is_taken",
            STATES + "test_ranks_share_the_hashing_and_leave_no_file_out",
            "test_sealed.py::test_every_flipped_byte_is_seen",
            SOAK,
        ),
    ),
    Promise(
        "T15",
        "A file of another step: likewise.",
        (STATES + "test_a_file_of_another_step_is_found_out",),
    ),
    Promise(
        "T16",
        "A missing file, an empty, dangling or missing `latest`: no run starts over silently.",
        (
            STATES + "test_what_latest_says_does_not_matter",
            STATES + "test_a_run_whose_states_are_gone_does_not_start_over_silently",
            ONE + "test_a_run_whose_states_are_gone_says_that_it_starts_over",
            SOAK,
        ),
    ),
    Promise(
        "T17",
        "All states damaged: each is named, nothing is deleted.",
        (STATES + "test_all_states_damaged_is_an_error_that_names_each_and_deletes_nothing",),
    ),
    Promise(
        "T18",
        "A full disk, or a limit of a file's size: named with need and free; older states stay.",
        (
            STATES + "test_a_full_disk_is_told_before_anything_is_written",
            STATES
            + "test_a_state_that_could_not_be_written_whole_does_not_count_and_the_older_one_stays",
            STATES + "test_a_disk_that_fills_up_amid_a_save_is_told_with_file_need_and_room",
            STATES + "test_a_manifest_that_does_not_fit_is_named_and_leaves_no_state_behind",
            OUTPUTS + "test_a_write_that_stops_short_goes_on_or_names_file_need_and_free",
            OUTPUTS
            + "test_a_copy_that_stops_short_names_what_it_writes_with_the_need_of_the_whole_file",
            SOAK,
        ),
    ),
    Promise(
        "T19",
        "An output that can't be written, or is removed during the run: one line.",
        (
            ONE + "test_a_disk_that_can_not_be_written_is_told_before_anything_is_read",
            ONE + "test_a_folder_that_is_removed_ends_the_run_with_a_line",
            OUTPUTS + "test_an_output_where_nobody_may_write_is_refused_before_the_work",
        ),
    ),
    Promise(
        "T20",
        "A second run of one output is refused by process, host and job; the lock of a killed one"
        " is none.",
        (
            HEAP,
            "test_train.py::test_a_second_run_of_the_same_output_is_refused",
            OUTPUTS + "test_the_second_writer_is_told_who_the_first_is_and_the_first_goes_on",
            OUTPUTS + "test_the_second_writer_is_told_the_job_of_the_first",
            OUTPUTS + "test_the_lock_of_a_killed_process_is_none",
        ),
    ),
    Promise(
        "T21",
        "A run resumed at any step reads each sample once.",
        (
            RESUMED + "test_a_run_stopped_at_any_step_reads_what_one_reads_that_nobody_stops",
            RESUMED + "test_an_epoch_has_each_sample_once",
            MIXTURE + "test_random_access_equals_sequential_access",
            "runtime/test_loop.py::test_each_step_trains_on_each_of_its_samples_once",
            SOAK,
        ),
    ),
    Promise(
        "T22",
        "Invalid UTF-8 is named by file and line, or skipped and counted.",
        (
            ROWS + "test_a_damaged_row_is_named_by_file_and_line_or_skipped_and_counted",
            "data/test_corpora.py::test_damaged_rows_stop_or_are_counted",
        ),
    ),
    Promise(
        "T23",
        "So is every other damaged row: empty, null, of another type, cut off, with NUL.",
        (ROWS + "test_a_damaged_row_is_named_by_file_and_line_or_skipped_and_counted",),
    ),
    Promise(
        "T24",
        "A line of 50 MB, or of 20 kB that unpack to 200 MB, is refused in bounded memory.",
        (ROWS + "test_a_long_line_is_refused_by_a_process_of_bounded_memory",),
    ),
    Promise(
        "T25",
        "Missing, unknown and empty domains and wrong weights are named before a model is built.",
        (
            MIXTURE + "test_bad_mixtures",
            MIXTURE + "test_domains_without_text",
            "data/test_sources.py::test_an_empty_domain_is_an_error",
            "test_train.py::test_what_can_not_be_trained_is_one_line",
        ),
    ),
    Promise(
        "T26",
        "Text that changed since the state was saved is refused by its domain; a tokenizer or"
        " setting that did is told apart from it.",
        (
            ONE + "test_another_text_is_refused_by_its_name",
            STATES + "test_other_data_is_told_by_what_it_was_made_of",
        ),
        "No flag lets a run go on with changed text; give another output.",
    ),
    Promise(
        "T27",
        "Other ranks, expert parallelism or ZeRO stage take over each weight and moment.",
        (
            LAYOUTS + "test_another_layout_takes_over_every_element",
            LAYOUTS + "test_every_other_layout_takes_over_every_element",
            LAYOUTS + "test_train_py_goes_on_with_other_ranks_and_another_stage",
        ),
    ),
    Promise(
        "T28",
        "A change of ranks needs no conversion; a layout that can't run is one sentence.",
        (
            LAYOUTS + "test_train_py_goes_on_with_other_ranks_and_another_stage",
            "runtime/test_engine.py::test_a_layout_that_cannot_run_is_refused_in_one_sentence",
        ),
    ),
    Promise(
        "T29",
        "Experts of other shapes: all differences in one table, before weights are read.",
        ("upcycling/test_compatible.py::test_all_differences_stand_in_one_table",),
    ),
    Promise(
        "T30",
        "Another tokenizer of the same size: the first tokens that differ are named.",
        (
            TOKENIZER + "test_tokens_of_other_ids_are_named",
            TOKENIZER + "test_a_chat_template_that_is_left_behind_is_said",
            BLEND + "test_other_tokenizer",
        ),
        "A chat template of another kind is a note on stderr, no error.",
    ),
    Promise(
        "T31",
        "Experts of other dtypes are cast, named and recorded.",
        (
            "upcycling/test_new_checkpoint.py::"
            "test_experts_of_another_dtype_are_cast_to_the_seeds_and_named",
            BLEND + "test_a_cast_that_overflows",
        ),
    ),
    Promise(
        "T32",
        "NaN, Inf or a missing tensor: model, tensor and count; nothing is made up.",
        (
            BLEND + "test_bad_values_name_model_tensor_and_count",
            BLEND + "test_missing_tensor",
            LOADING + "test_missing_tensor_is_not_made_up",
        ),
    ),
    Promise(
        "T33",
        "Typos at every level, wrong types and duplicate keys are named with the nearest word;"
        " 1:30, 017 and the name `no` are read as no number and no switch.",
        (
            CONFIG + "test_bad_recipes_are_named",
            CONFIG + "test_numbers_in_yaml_notation_are_numbers",
            CONFIG + "test_what_is_no_plain_number_is_a_text_and_no_setting_that_is_a_number",
            CONFIG + "test_a_name_stays_as_it_is_written",
            "runtime/test_engine.py::test_misspelt_keys_are_found_at_both_levels",
            OUTSIDE + "test_a_deepspeed_json",
        ),
    ),
    Promise(
        "T34",
        "A batch without a finite loss or gradient is left out by all ranks, counted, its documents"
        " named; several in a row end the run with a state of before.",
        (
            "runtime/test_bad_batches.py::"
            "test_a_bad_batch_leaves_the_run_as_if_its_step_had_not_been_done",
            "runtime/test_bad_batches.py::"
            "test_several_in_a_row_end_the_run_and_the_next_start_goes_on_behind_them",
        ),
        "A loss that is large but finite is clipped and logged, with no warning of its own.",
    ),
    Promise(
        "T35",
        "What can't fit is refused before the start, with its parts. Of what ranks allocate,"
        " planned states are within 1%, weights, gradients and optimizer states each within 3%,"
        " activations within 8%.",
        (
            "runtime/test_loop.py::test_what_cannot_fit_is_refused_unless_that_is_switched_off",
            "planning/test_fitting.py::test_a_refusal_names_the_parts_of_what_it_adds_up",
            "planning/test_memory.py::test_real_ranks_allocate_what_was_planned",
        ),
        "Parts are not compared under offload, activations not under ZeRO-3; what CUDA and its"
        " allocator take is estimated.",
    ),
    Promise(
        "T36",
        "The same seed gives the same bits on the same CPUs and number of ranks.",
        (SOAK, LAYOUTS + "test_the_same_layout_goes_on_to_bit_equal_weights_and_moments"),
        "Not promised across numbers of ranks, kinds of hardware, or GPU kernels.",
    ),
    Promise(
        "S1",
        "Weights are safetensors; pickles are refused by name and by content.",
        (
            HEADERS + "test_pickles_are_refused_by_name_and_by_content",
            LOADING + "test_pickled_weights_are_refused",
        ),
    ),
    Promise(
        "S2",
        "No pickle, eval, exec, shell or network in the package.",
        (
            "test_trust.py::test_whatever_could_run_foreign_code_or_reach_out_is_named_with_its_reason",
            "test_trust.py::test_no_shell_and_no_code_of_a_checkpoint",
            AUDIT + "test_a_training_that_dies_and_goes_on",
            AUDIT + "test_verbs_that_read_checkpoints_of_others",
        ),
        "Places that need one of these are named with their reason.",
    ),
    Promise(
        "S3",
        "A training state holds no pickle: reading one runs no code.",
        (LAYOUTS + "test_a_state_holds_no_rank_no_vacant_slot_and_no_pickle",),
        "Hashes tell of damage, not of an attacker who writes to the folder.",
    ),
    Promise(
        "S4",
        "No code of a checkpoint, tokenizer or encoder is run, and no file can ask for it.",
        (
            LOADING + "test_code_hooks_are_refused",
            LOADING + "test_code_beside_a_model_is_not_run_even_where_its_hooks_are_not_seen",
            "checkpoint/test_build.py::test_code_of_a_checkpoint_is_never_run",
            TOKENIZER + "test_code_of_a_model_is_refused_and_not_run",
            "data/test_sentence_encoder.py::test_code_of_an_encoder_is_not_run",
            "data/test_sentence_encoder.py::test_code_beside_a_model_of_the_library_is_not_run",
            "data/test_encoder_checks.py::test_what_is_refused",
        ),
    ),
    Promise(
        "S5",
        "No network unless it is asked for.",
        (
            "data/test_offline.py::test_nothing_is_asked_of_the_network",
            LOADING + "test_hub_names_are_not_looked_up",
            AUDIT + "test_a_training_that_dies_and_goes_on",
            AUDIT + "test_verbs_that_read_checkpoints_of_others",
        ),
    ),
    Promise(
        "S6",
        "Names in files lead nowhere out of their folder, nor do links.",
        (
            HEADERS + "test_indexes_that_lie",
            HEADERS + "test_links_may_not_lead_out_but_in_a_hub_cache",
            STATES + "test_a_manifest_leads_nowhere_else",
            TOKENIZER + "test_files_that_a_configuration_names_outside_are_refused",
            TOKENIZER + "test_links_that_lead_out_are_not_followed",
        ),
    ),
    Promise(
        "S7",
        "No archive is unpacked.",
        ("faults/test_promises.py::test_nothing_in_the_package_opens_archives",),
    ),
    Promise(
        "S8",
        "YAML without tags, aliases and duplicates, of bounded size and depth.",
        (
            CONFIG + "test_bad_recipes_are_named",
            CONFIG + "test_a_huge_recipe_is_refused",
            OUTSIDE + "test_a_recipe",
        ),
    ),
    Promise(
        "S9",
        "No word of a recipe reaches a shell or SLURM as more than a word.",
        (
            INJECTION + "test_names_and_settings_reach_programs_as_one_word",
            INJECTION + "test_a_run_s_folder_is_only_a_path",
            INJECTION + "test_a_domain_never_reaches_a_shell",
            INJECTION + "test_pipeline_submits_words_and_never_sbatch_lines",
        ),
    ),
    Promise(
        "S10",
        "All files have the mode of the umask; secrets of the environment are written nowhere.",
        (
            HEAP,
            OUTPUTS + "test_every_file_of_an_output_has_the_mode_of_the_umask",
            "commands/test_upcycle.py::test_every_file_may_be_read_by_those_whom_the_umask_allows",
        ),
        "By decision no stricter than the umask: models are shared, and who wants them closed sets"
        " umask 077.",
    ),
    Promise(
        "S11",
        "Nothing listens but the ranks' own connections, on the job's address.",
        (HEAP, WATCHDOG + "test_rank_0_listens_where_the_others_reach_it_and_nowhere_else"),
        "torch's rendezvous listens on all addresses of rank 0's machine, and nothing asks who"
        " connects: the network must be a trusted one. So does the watchdog's door until all ranks"
        " have come, where an address by which they reach rank 0 is not its own; the log says it.",
    ),
    Promise(
        "S12",
        "Versions of torch, DeepSpeed, transformers, safetensors or numpy that are too old end a"
        " training at its start; preflight names all that differ, and those of other nodes.",
        (
            INSTALLED + "test_a_training_starts_with_newer_versions_and_not_with_older_ones",
            INSTALLED + "test_installed_versions_are_compared_with_the_package_s",
            "runtime/test_node_checks.py::test_nodes_with_other_versions_are_named",
        ),
    ),
    Promise(
        "S13",
        "Headers of weight files have limits; overlaps, gaps and repeated names are refused.",
        (
            HEADERS + "test_headers_that_lie",
            HEADERS + "test_header_length_is_checked_before_reading",
            OUTSIDE + "test_the_header_of_a_weight_file",
        ),
    ),
)


def functions(path):
    """Return the names of a file's tests."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def named():
    """Return every test of the table once, in its order."""
    return list(dict.fromkeys(test for promise in PROMISES for test in promise.tests))


def by_file(tests):
    """Return tests as they stand in their files, for those of a file share what they start."""

    def place(test):
        file, _, function = test.partition("::")
        text = (TESTS / file).read_text(encoding="utf-8")
        return file, text.index(f"def {function}(")

    return sorted(tests, key=place)


def to_run():
    """Return what pytest is given: the table's tests, and all that stands under tests/faults."""
    elsewhere = [test for test in named() if not test.startswith("faults/")]
    return [*(TESTS / test for test in by_file(elsewhere)), TESTS / "faults"]


def outcomes(report):
    """Return by test how many of its cases passed, failed and were skipped, of a JUnit report."""
    found = {}
    for case in xml.parse(report).iter("testcase"):
        test = f"{case.get('classname').replace('.', '/')}.py::{case.get('name').split('[')[0]}"
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        outcome = "failed" if bad else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(test.removeprefix("tests/"), Counter())[outcome] += 1
    return found


def run(options):
    """Run the tests of the table and the rest of tests/faults; keep what came out of the table's in
    tests/promises.json.

    What an option leaves out (-m "not slow") keeps the result of its last run.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [str(path) for path in to_run()]
        # A cluster's whole run is one test's fixture, and machines are shared.
        limits = [f"--junitxml={report}", "--timeout=1800"]
        command = [sys.executable, "-m", "pytest", *limits, *options, *words]
        code = subprocess.run(command, cwd=TESTS.parent).returncode
        found = outcomes(report)
    now = {
        test: dict(sorted(counts.items())) | {"on": f"{date.today()}"}
        for test, counts in found.items()
    }
    kept = json.loads(RESULTS.read_text()) | now
    RESULTS.write_text(json.dumps({t: kept[t] for t in named() if t in kept}, indent=1) + "\n")
    return code


def result(test, kept):
    """Return a test's last result in words, with its day."""
    if test not in kept:
        return "not run"
    counts = {outcome: count for outcome, count in kept[test].items() if outcome != "on"}
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"{said} ({kept[test]['on']})"


def row(promise, kept):
    """Return a promise as a line of the page's table."""
    tests = "<br>".join(
        f"[{test.partition('::')[2].removeprefix('test_').replace('_', ' ')}]"
        f"(../tests/{test.partition('::')[0]})"
        for test in promise.tests
    )
    results = "<br>".join(result(test, kept) for test in promise.tests)
    words = promise.words + (f" *{promise.open}*" if promise.open else "")
    return f"| {promise.name} | {words} | {tests or '**none**'} | {results or '-'} |"


def page(results):
    """Return the page."""
    rows = [row(promise, results) for promise in PROMISES]
    template = (TESTS / "promises.md").read_text(encoding="utf-8")
    figures = {
        name: f"```\n{(TESTS / f'{name}.txt').read_text(encoding='utf-8').strip()}\n```"
        for name in ("soak", "fuzz")
    }
    return template.format(rows="\n".join(rows), **figures)


def main():
    verb, *options = sys.argv[1:]
    code = run(options) if verb == "run" else 0
    PAGE.write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
