# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import random

import pytest

from bundle.data import EventSampler, read_cohort, single_scan, split_cohort
from bundle.errors import InputError
from bundle.run import usual_tmax

HEADER = "patient_id,image,time,event"


@pytest.fixture
def write(tmp_path):
    """Write a cohort whose scans a.nii.gz, b.nii.gz, c.nii.gz and mask m.nii.gz are there."""
    for name in "abcm":
        (tmp_path / f"{name}.nii.gz").touch()

    def cohort(*lines: str, encoding: str = "utf-8"):
        path = tmp_path / "cohort.csv"
        path.write_text("\n".join(lines) + "\n", encoding=encoding)
        return path

    return cohort


def fault_of(path, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_cohort(path, **options)
    return str(caught.value)


def test_reads_the_contract(write, tmp_path):
    path = write(
        "patient_id,image,time,event,lung_mask,gt_mask,split,fold,age,sex,dose",
        "A,a.nii.gz,12.5,1,m.nii.gz,,train,0,61,f,",
        "",
        f"B b,{tmp_path}/b.nii.gz,99,0,,m.nii.gz,val,1,70.5,m,3",
        encoding="utf-8-sig",
    )
    first, second = read_cohort(path, clinical={"dose": "numeric", "age": "numeric", "sex": "categorical"}, tmax=100)
    assert first.pop("covariates") == {"dose": None, "age": 61.0, "sex": "f"}
    assert first == {
        "patient_id": "A",
        "image": str(tmp_path / "a.nii.gz"),
        "lung_mask": str(tmp_path / "m.nii.gz"),
        "time": 12.5,
        "event": 1,
        "split": "train",
        "fold": 0,
    }
    assert second["patient_id"] == "B b" and second["image"].endswith("b.nii.gz")
    assert second["covariates"] == {"dose": 3.0, "age": 70.5, "sex": "m"}
    assert "lung_mask" not in second and "gt_mask" in second


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("A,a.nii.gz,0,1", "row 3, column time: '0' (expected months as a number > 0)"),
        ("A,a.nii.gz,-3,1", "row 3, column time: '-3'"),
        ("A,a.nii.gz,,1", "row 3, column time: empty"),
        ("A,a.nii.gz,soon,1", "row 3, column time: 'soon'"),
        ("A,a.nii.gz,inf,1", "row 3, column time: 'inf'"),
        ("A,a.nii.gz,nan,1", "row 3, column time: 'nan'"),
        ("A,a.nii.gz,5,2", "row 3, column event: '2' (expected 1 died or 0 censored)"),
        ("A,a.nii.gz,5,yes", "row 3, column event: 'yes'"),
        ("A,a.nii.gz,5,", "row 3, column event: empty"),
        ("A,a.nii.gz,60,1", "row 3, column time: 60 (expected months, less than tmax, which is 60; --tmax sets another)"),
        ("first,a.nii.gz,5,1", "row 3, column patient_id: 'first' is in row 2 too"),
        (",a.nii.gz,5,1", "row 3, column patient_id: empty"),
        ("../A,a.nii.gz,5,1", "row 3, column patient_id: '../A'"),
        ("A\\B,a.nii.gz,5,1", "row 3, column patient_id: 'A\\\\B'"),
        ("A\x07,a.nii.gz,5,1", "row 3, column patient_id: 'A\\x07'"),
        ("A,,5,1", "row 3, column image: empty"),
        ("A,~nobody_of_that_name/a.nii.gz,5,1", "row 3, column image: "),
        ("A,a.nii.gz,5", "row 3: 3 values (expected 4, as in the header)"),
        ("A,lost.nii.gz,5,1", "row 3, column image: "),
        ("A,cohort.csv,5,1", "has the suffix '.csv' (expected one of .nii .nii.gz"),
    ],
)
def test_a_fault_names_row_column_and_what_was_expected(write, row, says):
    message = fault_of(write(HEADER, "first,a.nii.gz,5,1", row), tmax=60)
    assert says in message and "has a fault:" in message


def test_an_image_is_in_one_part_whoever_it_is_said_to_be_of(write):
    header = HEADER + ",split,fold"
    message = fault_of(write(header, "A,a.nii.gz,5,1,train,0", "B,b.nii.gz,5,1,test,0", "C,a.nii.gz,5,1,test,1"))
    assert "row 4, column split: test, but train for the same image in row 2 (expected an image in one part)" in message
    assert "row 4, column fold: 1, but 0 for the same image in row 2" in message and "2 faults" in message


def test_all_faults_of_all_rows_come_at_once(write):
    message = fault_of(write(HEADER, "A,a.nii.gz,0,7", "B,b.nii.gz,5,1", "C,lost.nii.gz,text,1"))
    assert "4 faults" in message
    for says in ("row 2, column time", "row 2, column event", "row 4, column time", "row 4, column image"):
        assert says in message
    assert "row 3" not in message


def test_a_category_written_as_a_number_has_one_spelling(write):
    written = {"1": "1", "1.0": "1", "1234567": "1234567", "IIb": "IIb", "nan": None, "": None}
    rows = [f"p{i},a.nii.gz,5,1,{text}" for i, text in enumerate(written)]
    records = read_cohort(write(HEADER + ",stage", *rows), clinical={"stage": "categorical"})
    assert [record["covariates"]["stage"] for record in records] == list(written.values())


def test_faults_of_the_table(write, tmp_path):
    assert "the file is empty" in fault_of(write(""))
    assert "no rows" in fault_of(write(HEADER))
    assert "no row has event 1" in fault_of(write(HEADER, "A,a.nii.gz,5,0"))
    assert "row 1, column image: missing (found: patient_id, time, event)" in fault_of(
        write("patient_id,time,event", "A,5,1")
    )
    assert "row 1, column 'time': there are 2" in fault_of(write(HEADER + ",time", "A,a.nii.gz,5,1,5"))
    assert "column smoker: named as clinical but missing (expected one of the table's: age)" in fault_of(
        write(HEADER + ",age", "A,a.nii.gz,5,1,60"), clinical={"smoker": "numeric"}
    )
    assert "column time: not a clinical column" in fault_of(write(HEADER, "A,a.nii.gz,5,1"), clinical={"time": "numeric"})
    assert "row 2, column sex: 'f' (expected a number" in fault_of(
        write(HEADER + ",sex", "A,a.nii.gz,5,1,f"), clinical={"sex": "numeric"}
    )
    for clinical in (["sex"], {"sex": "text"}, 5, "sex"):
        assert 'expected each column with its kind, such as {"age": "numeric"' in fault_of(
            write(HEADER + ",sex", "A,a.nii.gz,5,1,f"), clinical=clinical
        )
    assert "row 2, column split: 'valid' (expected train, val or test)" in fault_of(
        write(HEADER + ",split", "A,a.nii.gz,5,1,valid")
    )
    assert "row 2, column fold: '1.5' (expected an integer)" in fault_of(write(HEADER + ",fold", "A,a.nii.gz,5,1,1.5"))
    assert "No such file" in fault_of(tmp_path / "lost.csv")
    assert "table 5: No such file" in fault_of(5)
    assert "tmax is 'abc' (expected a number of months)" in fault_of(write(HEADER, "A,a.nii.gz,5,1"), tmax="abc")
    for data, says in {
        b"\x00\x01": "it holds characters of code 0",
        (HEADER + "\n").encode() + b"M\xfcller,a.nii.gz,5,1\n": "row 2 is not in UTF-8",
        "a,b".encode("utf-16")[:-1]: "row 1 is not in UTF-8",
        b"PK\x03\x04xl/workbook.xml": "it is an Excel workbook or another zip (expected a CSV in UTF-8",
        b"\n<!doctype html><title>Please log in": "it is a web page",
        b"\x1f\x8b\x08": "it is gzip",
        b"patient_id;image;time;event\nA;a.nii.gz;5,5;1\n": "its columns are separated by semicolons (expected commas)",
        b"patient_id\timage\n": "separated by tabs",
        b"Exported 2024\n" + HEADER.encode() + b"\nA,a.nii.gz,5,1\n": "row 1 is 'Exported 2024' alone",
        HEADER.encode() + b'\nA,a.nii.gz,5,1\n"B,a.nii.gz,5,1\nC,a.nii.gz,5,1\n': "that begins in row 3 is not closed",
        HEADER.encode() + b'\n"A",a.nii.gz,5,1\n"B"x,a.nii.gz,5,1\n': "row 3",
        HEADER.encode() + b'\n"A,a.nii.gz,5,1\nB",a.nii.gz,5,1,2\n': 'rows 2 to 3, which a quote (") joins: 5 values',
    }.items():
        (tmp_path / "other.csv").write_bytes(data)
        assert says in fault_of(tmp_path / "other.csv"), data


def test_tables_as_spreadsheets_leave_them_are_read(write, tmp_path):
    plain = read_cohort(write(HEADER, "A,a.nii.gz,5,1", "B,b.nii.gz,6,0"))
    for lines, encoding in (
        (["sep=,", HEADER, "A,a.nii.gz,5,1", "B,b.nii.gz,6,0"], "utf-8"),
        ([HEADER + ",,", "A,a.nii.gz,5,1,,", "B,b.nii.gz,6,0,,", ",,,,,"], "utf-8"),
        ([HEADER, "A,a.nii.gz,5,1,", "B,b.nii.gz,6,0,,"], "utf-8"),
        ([HEADER, "A,a.nii.gz,5,TRUE", "B,b.nii.gz,6,False"], "utf-16"),
        ([HEADER, "A,a.nii.gz,5,Dead", "B,b.nii.gz,6,alive"], "utf-8"),
        ([HEADER, f'A,"""{tmp_path}/a.nii.gz""",5,1', "B,.\\b.nii.gz,6,0"], "utf-8"),
    ):
        assert read_cohort(write(*lines, encoding=encoding)) == plain, lines
    assert "row 2: 5 values (expected 4" in fault_of(write(HEADER, "A,a.nii.gz,5,1,x"))
    assert "row 2, column time: '9_9'" in fault_of(write(HEADER, "A,a.nii.gz,9_9,1"))
    assert read_cohort(write(HEADER + ",split", "A,a.nii.gz,5,1,Train"))[0]["split"] == "train"
    assert read_cohort(write(HEADER + ",", "A,a.nii.gz,5,1,left"))[0]["patient_id"] == "A"  # a column without a name


def test_words_for_missing_are_the_same_in_every_column(write, caplog):
    words = ["NA", "N/A", "nan", "unknown", "Unknown", "null", "Not Collected", "-", "?", "<NA>"]
    kinds = {"age": "numeric", "stage": "categorical"}
    with caplog.at_level(logging.INFO):
        rows = [f"p{i},a.nii.gz,5,1,{word},{word},{word}" for i, word in enumerate(words)]
        records = read_cohort(write(HEADER + ",gt_mask,age,stage", *rows), clinical=kinds)
    assert all(record["covariates"] == {"age": None, "stage": None} for record in records)
    assert not any("gt_mask" in record for record in records)
    assert "cells taken as missing: 3 'NA', 3 'N/A'" in caplog.text
    rest = read_cohort(
        write(HEADER + ",stage", "A,a.nii.gz,5,1,none", "B,b.nii.gz,5,1,1_0"), clinical={"stage": "categorical"}
    )
    assert [record["covariates"]["stage"] for record in rest] == ["none", "1_0"]
    for row, column in (("NA,a.nii.gz,5,1", "patient_id"), ("A,a.nii.gz,5,unknown", "event")):
        assert f"row 2, column {column}: '{'NA' if column == 'patient_id' else 'unknown'}'" in fault_of(write(HEADER, row))


def test_ids_that_differ_by_zeros_are_two_patients_with_a_warning(write, caplog):
    rows = [f"{name},{i}.nii.gz,5,1" for i, name in enumerate(("00123", "123", "P0", "0P0", "0", "0.5"))]
    assert len(read_cohort(write(HEADER, *rows), check_files=False)) == 6
    assert caplog.messages == ["patients 00123 and 123 differ by zeros alone: they are taken for two"]


def test_what_a_spreadsheet_made_of_ids_and_categories_is_refused(write):
    for name in ("1.23E+11", "1E+15", "#REF!", "#NAME?"):
        assert f"row 2, column patient_id: '{name}'" in fault_of(write(HEADER, f"{name},a.nii.gz,5,1"))
    header, kinds = HEADER + ",sex", {"clinical": {"sex": "categorical"}}
    assert "column sex: '#VALUE!' (expected a category" in fault_of(write(header, "A,a.nii.gz,5,1,#VALUE!"), **kinds)
    mixed = write(header, "A,a.nii.gz,5,1,Male", "B,b.nii.gz,6,0,male")
    assert "row 3, column sex: 'male' is 'Male' of row 2 in another case" in fault_of(mixed, **kinds)
    assert len(read_cohort(mixed, need_clinical=False, **kinds)) == 2  # inference compares with training


def test_contradictions_that_may_be_meant_are_warned_of(write, caplog):
    read_cohort(write(HEADER, "A,a.nii.gz,5,1", "B,a.nii.gz,6,0", "A,b.nii.gz,4,0"))
    assert caplog.messages == [
        "patients A and B have one image; a random split may put it in two parts",
        "patient A: event differs between rows 2 and 4",
    ]


def test_faults_are_told_by_the_line_that_a_row_begins_in(write):
    path = write(HEADER + ",note", 'A,a.nii.gz,5,1,"over', 'two lines"', 'B,b.nii.gz,0,1,"over', 'two lines"')
    assert "row 4, column time: '0'" in fault_of(path)
    assert read_cohort(write("\ufeff" + HEADER.replace("image", "image\u200b"), "A,a.nii.gz,5,1", encoding="utf-8-sig"))


def test_months_that_are_days_are_refused(write):
    assert "row 2, column time: 900 (expected months, less than 360)" in fault_of(write(HEADER, "A,a.nii.gz,900,1"))
    assert read_cohort(write(HEADER, "A,a.nii.gz,900,1"), tmax=1000)[0]["time"] == 900


@pytest.mark.parametrize("longest, tmax", [("99.9", 100), ("100", 110), ("146.2", 150), ("900", 100), ("NA", 100)])
def test_the_usual_tmax_is_the_next_ten_months_after_the_longest_follow_up(write, longest, tmax):
    assert usual_tmax(str(write(HEADER, "A,a.nii.gz,5,1", f"B,b.nii.gz,{longest},0"))) == tmax and usual_tmax(None) == 100


def test_a_scan_at_fault_can_be_skipped_or_marked_but_the_table_cannot(write, caplog):
    lines = [HEADER + ",gt_mask", "A,a.nii.gz,5,1,", "B,lost.nii.gz,6,1,", "C,c.nii.gz,7,0,lost.nii.gz"]
    with caplog.at_level(logging.WARNING):
        kept = read_cohort(write(*lines), on_fault="skip")
    assert [record["patient_id"] for record in kept] == ["A"]
    assert len(caplog.records) == 3 and "patient B" in caplog.text and "row 4, column gt_mask" in caplog.text

    marked = read_cohort(write(*lines), on_fault="row", need_outcome=False)
    assert ["fault" in record for record in marked] == [False, True, True]
    assert "row 3, column image" in marked[1]["fault"] and "does not exist" in marked[1]["fault"]

    for on_fault in ("skip", "row"):
        assert "row 2, column time" in fault_of(write(HEADER, "A,a.nii.gz,0,1"), on_fault=on_fault)
    assert "no scans remain" in fault_of(write(HEADER, "A,lost.nii.gz,5,1"), on_fault="skip")
    assert fault_of(write(*lines)).endswith("\nThe same command with --on_fault skip goes on without these scans.")
    assert "2 of 3 scans are left out" in caplog.text
    assert "on_fault is 'ignore'" in fault_of(write(HEADER), on_fault="ignore")
    assert len(read_cohort(write(HEADER, "A,lost.nii.gz,5,1"), check_files=False)) == 1


def test_inference_takes_only_outcomes_that_are_valid(write):
    asked = {"need_outcome": False}
    assert read_cohort(write("patient_id,image", "A,a.nii.gz"), **asked)[0].keys() == {"patient_id", "image"}
    for rest in ("0,", ",", "5,", ",1", "NA,2", "-5,1", "2000,1"):
        assert read_cohort(write(HEADER, f"A,a.nii.gz,{rest}"), **asked)[0].keys() == {"patient_id", "image"}
    known = read_cohort(write(HEADER, "A,a.nii.gz,5.5,alive"), **asked)[0]
    assert (known["time"], known["event"]) == (5.5, 0)
    assert "time" not in read_cohort(write("patient_id,image,time", "A,a.nii.gz,-1"), **asked)[0]


@pytest.mark.parametrize(
    ("name", "patient"),
    [("scan 1.nii.gz", "scan_1"), ("x.MHA", "x"), ("dicom.2 ü", "dicom_2"), ("...nrrd", "scan")],
)
def test_single_scan_is_named_after_its_file(tmp_path, name, patient):
    path = tmp_path / name
    path.mkdir() if "dicom" in name else path.touch()
    assert single_scan(path) == [{"patient_id": patient, "image": str(path)}]


def test_single_scan_must_be_there(tmp_path):
    for image in (tmp_path / "lost.nii.gz", 5):
        with pytest.raises(InputError, match="does not exist"):
            single_scan(image)


def people(deaths: int, censored: int, **columns) -> list[dict]:
    events = [1] * deaths + [0] * censored
    return [{"patient_id": f"p{i:03}", "event": event, **columns} for i, event in enumerate(events)]


def ids(part: list[dict]) -> list[str]:
    return sorted(record["patient_id"] for record in part)


def test_seeded_split_is_stratified_and_does_not_depend_on_row_order():
    cohort = people(40, 60)
    parts = split_cohort(cohort, seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 70, "val": 15, "test": 15}
    assert {name: sum(r["event"] for r in part) for name, part in parts.items()} == {"train": 28, "val": 6, "test": 6}
    assert ids(parts["train"] + parts["val"] + parts["test"]) == ids(cohort)

    shuffled = random.Random(1).sample(cohort, len(cohort))
    assert split_cohort(shuffled, seed=3) == parts
    assert ids(split_cohort(cohort, seed=4)["val"]) != ids(parts["val"])


@pytest.mark.parametrize(("deaths", "censored"), [(3, 0), (3, 1), (4, 9), (5, 2), (6, 50)])
def test_three_deaths_are_enough_for_one_in_each_part(deaths, censored):
    parts = split_cohort(people(deaths, censored))
    assert all(any(record["event"] for record in part) for part in parts.values())
    assert sum(map(len, parts.values())) == deaths + censored


def test_split_and_fold_columns_are_obeyed():
    cohort = people(2, 1)
    for record, part in zip(cohort, ("val", "train", "test")):
        record["split"] = part
    parts = split_cohort(cohort)
    assert {name: ids(part) for name, part in parts.items()} == {"val": ["p000"], "train": ["p001"], "test": ["p002"]}
    with pytest.raises(InputError, match="column split"):
        split_cohort(cohort, fold=0)

    folds = [{**record, "fold": i % 3} for i, record in enumerate(people(3, 3))]
    parts = split_cohort(folds, fold=1)
    assert ids(parts["val"]) == ["p001", "p004"] and len(parts["train"]) == 4 and parts["test"] == []
    with pytest.raises(InputError, match=r"fold 7 does not exist .*\[0, 1, 2\]"):
        split_cohort(folds, fold=7)
    with pytest.raises(InputError, match="there is none"):
        split_cohort(people(3, 3), fold=0)


def test_nothing_to_train_or_validate_on_is_refused():
    with pytest.raises(InputError, match="leave none for val"):
        split_cohort(people(1, 0))
    with pytest.raises(InputError, match="leave none for train"):
        split_cohort(people(2, 2, split="val"))


@pytest.mark.parametrize("share", [1, -0.1, "abc", None, True])
def test_the_share_of_deaths_is_a_number_below_one(share):
    with pytest.raises(InputError, match=r"min_event_share is .* \(expected a share in \[0, 1\)\)"):
        EventSampler(None, share)
