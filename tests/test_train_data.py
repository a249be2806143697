"""What training reads: folders with good and bad rows, CT-RATE's shape, phantoms, caches, latents."""

import csv
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from small import SMALL

from t2ct.data.phantoms import LABELS, ORGANS, phantom
from t2ct.models import VAE
from t2ct.train.data import BadVolume, Cached, PhantomSource, open_data
from t2ct.train.data.latents import SHARD, LatentSource, encode_source
from t2ct.train.data.order import Samples
from t2ct.train.data.phantoms import WORDINGS, draw_names, small_findings
from t2ct.train.data.source import check_hu, fingerprint, fit

SIZE = (16, 16, 16)


def write_ct(path, hu=None, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if hu is None:
        hu = phantom(3, size=(20, 16, 18)).hu
    nib.save(nib.Nifti1Image(hu, np.diag([5.0, 5.0, 5.0, 1.0]) if affine is None else affine), path)


def write_table(path, columns, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        write_ct(tmp_path / f"volumes/{i}.nii.gz")
    labels = " ".join("01"[i % 2] for i in range(18))
    write_table(
        tmp_path / "manifest.csv", ("volume", "report", "findings", "impression", "labels", "split"),
        ("volumes/0.nii.gz", "A nodule.", "", "", labels, "train"),
        ("volumes/1.nii.gz", "nan", "Emphysema.", "nan", "", "training"),
        ("volumes/2.nii.gz", "", "", "Normal.", "", "valid"),
        ("volumes/3.nii.gz", "Effusion.", "", "", "", "train"),
    )  # fmt: skip
    return tmp_path


def test_a_prepared_folder(folder):
    source, valid = (open_data(str(folder), split, SIZE) for split in ("train", "valid"))
    assert [e.texts for e in source.entries] == [("A nodule.",), ("Findings: Emphysema.",), ("Effusion.",)]
    assert [e.texts for e in valid.entries] == [("Impression: Normal.",)]
    assert source.entries[0].labels == (0, 1) * 9 and source.entries[1].labels is None
    item = source.read(0)
    assert item.hu.shape == SIZE and item.hu.dtype == np.int16 and np.abs(item.hu).max() <= 1000
    assert item.spacing == pytest.approx((5 * 20 / 16, 5.0, 5 * 18 / 16))
    assert fingerprint(source) != fingerprint(valid)


def test_other_volumes_of_the_same_names_are_not_taken_from_a_cache(folder, tmp_path):
    """A cache may be shared by runs on several folders, and a folder's volumes may be replaced."""
    def first():
        return np.asarray(Cached(open_data(str(folder), "train", SIZE), tmp_path / "cache").read(0).hu)

    before, again = first(), first()
    assert np.array_equal(before, again)
    write_ct(folder / "volumes/0.nii.gz", hu=phantom(4, size=(20, 16, 18)).hu)
    assert not np.array_equal(first(), before)


def test_orientation_is_put_right(folder):
    hu = phantom(3, size=(20, 16, 18)).hu
    turned = np.ascontiguousarray(hu[::-1].transpose(0, 2, 1))
    affine = np.array([[-5.0, 0, 0, 95], [0, 0, 5, 0], [0, 5, 0, 0], [0, 0, 0, 1]])
    write_ct(folder / "volumes/3.nii.gz", turned, affine)
    source = open_data(str(folder), "train", SIZE)
    assert np.array_equal(source.read(2).hu, source.read(0).hu)


@pytest.mark.parametrize(
    ("change", "wanted"),
    (
        (("volumes/9.nii.gz", "A nodule.", ""), "1 of 2 volumes cannot be used: volumes/9.nii.gz: no such file"),
        (("volumes/1.nii.gz", "nan", ""), "volumes/1.nii.gz: no report"),
        (("../outside.nii.gz", "A nodule.", ""), "line 3: wanted a volume inside .*, got '../outside.nii.gz'"),
        (("/etc/passwd", "A nodule.", ""), "wanted a volume inside"),
        (("volumes/0.nii.gz", "A nodule.", ""), "line 3: wanted a row for each volume, got 'volumes/0.nii.gz' twice"),
        (("volumes/../volumes/0.nii.gz", "A nodule.", ""), "line 3: wanted a row for each .* first in .* line 2"),
        (("",), "line 3: wanted a volume inside .*, got ''"),
        (("volumes/1.nii.gz", "A nodule.", "0 1 0"), "line 3: wanted 18 labels of 0 or 1, got 3"),
        (("volumes/1.nii.gz", "A nodule.", "0;" * 17 + "2"), "wanted 18 labels of 0 or 1, got 18"),
    ),
)
def test_bad_rows_are_named(folder, change, wanted):
    columns = ("volume", "report", "labels")
    write_table(folder / "manifest.csv", columns, ("volumes/0.nii.gz", "Normal.", ""), change)
    with pytest.raises(ValueError, match=wanted):
        open_data(str(folder), "train", SIZE)


def test_links_in_the_folder_may_lead_anywhere(folder, tmp_path_factory):
    """Scans are large and lie where they lie: a folder of links to them is one that was prepared."""
    outside = tmp_path_factory.mktemp("elsewhere")
    write_ct(outside / "scans/ct.nii.gz")
    (folder / "volumes/8.nii.gz").symlink_to(outside / "scans/ct.nii.gz")
    (folder / "linked").symlink_to(outside / "scans")
    rows = ("volumes/8.nii.gz", "Normal."), ("linked/ct.nii.gz", "Normal."), ("volumes/9.nii.gz", "Normal.")
    write_table(folder / "manifest.csv", ("volume", "report"), *rows[:2])
    source = open_data(str(folder), "train", SIZE)
    assert len(source) == 2 and source.read(0).hu.shape == source.read(1).hu.shape == SIZE
    (folder / "volumes/9.nii.gz").symlink_to(outside / "gone.nii.gz")
    write_table(folder / "manifest.csv", ("volume", "report"), *rows)
    with pytest.raises(ValueError, match="volumes/9.nii.gz: no such file"):
        open_data(str(folder), "train", SIZE)


def test_bad_tables_are_named(folder):
    write_table(folder / "manifest.csv", ("file", "report"), ("a", "b"))
    with pytest.raises(ValueError, match="wanted a column 'volume', got file, report"):
        open_data(str(folder), "train", SIZE)
    write_table(folder / "manifest.csv", ("volume", "report", "split"), ("volumes/0.nii.gz", "b", "sometimes"))
    with pytest.raises(ValueError, match="wanted a split of train, .*, got 'sometimes'"):
        open_data(str(folder), "train", SIZE)
    with pytest.raises(FileNotFoundError, match="wanted manifest.csv or CT-RATE's"):
        open_data(str(folder / "volumes"), "train", SIZE)
    with pytest.raises(FileNotFoundError, match="wanted a folder or phantoms:N"):
        open_data(str(folder / "nowhere"), "train", SIZE)
    with pytest.raises(FileNotFoundError, match="wanted a folder or phantoms:N, got ''"):
        open_data("", "train", SIZE)
    with pytest.raises(ValueError, match="wanted phantoms:N, or phantoms:NxK, of 1 to 100000 in all"):
        open_data("phantoms:many", "train", SIZE)
    for word in ("²", "٣", "0", "-1", "1000000000", "", "1" * 5000):
        with pytest.raises(ValueError, match="wanted phantoms:N, or phantoms:NxK, of 1 to 100000 in all"):
            open_data(f"phantoms:{word}", "train", SIZE)


def test_what_cannot_be_used_is_left_out_when_asked(folder):
    write_table(
        folder / "manifest.csv", ("volume", "report"),
        ("volumes/0.nii.gz", "Normal."), ("volumes/9.nii.gz", "Normal."), ("volumes/1.nii.gz", ""),
        ("volumes/2.nii.gz", "Nodule."),
    )  # fmt: skip
    bad: list[str] = []
    with pytest.warns(UserWarning, match="2 of 4 volumes cannot be used"):
        source = open_data(str(folder), "train", SIZE, skip_bad=True, bad=bad)
    assert len(source) == 2 and len(bad) == 2
    with pytest.warns(UserWarning, match="1 of 4"):
        assert len(open_data(str(folder), "train", SIZE, texts=False, skip_bad=True)) == 3  # a VAE needs no report
    # a file that is there and cannot be read, or holds NaN, is found when its turn comes
    (folder / "volumes/0.nii.gz").write_bytes(b"no nifti")
    hu = phantom(3, size=SIZE).hu.astype(np.float32)
    hu[3, 3, 3] = np.nan
    write_ct(folder / "volumes/2.nii.gz", hu)
    for index, why in ((0, "signature of NIfTI"), (1, "1 that are NaN")):
        with pytest.raises(BadVolume, match=why):
            source.read(index)
    write_ct(folder / "volumes/2.nii.gz")
    listed = folder / "bad.txt"
    prepare = lambda item, draw: {"index": torch.tensor(draw[0])}  # noqa: E731
    assert isinstance(Samples(source, prepare)[(0, 0, 0)], BadVolume)
    for number in range(2):
        assert Samples(source, prepare, True, listed)[(0, number, 0)]["index"] == 1  # the next one
    assert listed.read_text().count("signature of NIfTI") == 1


def test_no_hu_are_warned_of_with_the_evidence(folder):
    hu = phantom(3, size=SIZE).hu.astype(np.int16)
    for values, told in ((hu + 1024, "no air in it: .* were not applied"), (hu - 1024, "applied twice"),
                         (hu // 8 + 200, "no air")):  # fmt: skip
        with pytest.warns(UserWarning, match=told):
            check_hu(values, "a.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_hu(hu, "a.nii.gz")
        check_hu(np.where(hu < -990, -3024, hu), "a.nii.gz")  # a scanner's padding is no mistake


def test_ct_rate_as_it_comes(tmp_path):
    for name in ("train_1_a_1", "train_2_a_1", "valid_1_a_1"):
        write_ct(tmp_path / f"dataset/{name.split('_')[0]}/{name[:7]}/{name}.nii.gz")
    columns = ("VolumeName", "ClinicalInformation_EN", "Findings_EN", "Impressions_EN")
    tables = tmp_path / "dataset/radiology_text_reports"
    write_table(
        tables / "train_reports.csv", columns,
        ("train_1_a_1.nii.gz", "", "A nodule.", "Nodule."), ("train_2_a_1.nii.gz", "", "nan", "Normal."),
    )  # fmt: skip
    write_table(tables / "validation_reports.csv", columns, ("valid_1_a_1.nii.gz", "x", "Emphysema.", ""))
    write_table(
        tmp_path / "dataset/multi_abnormality_labels/train_predicted_labels.csv", ("VolumeName", *LABELS),
        ("train_1_a_1.nii.gz", *[int(name == "Lung nodule") for name in LABELS]),
    )  # fmt: skip
    source = open_data(str(tmp_path), "train", SIZE)
    assert [e.texts[0] for e in source.entries] == ["Findings: A nodule. Impression: Nodule.", "Impression: Normal."]
    assert source.entries[0].labels[LABELS.index("Lung nodule")] == 1 and sum(source.entries[0].labels) == 1
    assert len(open_data(str(tmp_path), "valid", SIZE)) == 1
    assert source.read(1).hu.shape == SIZE


def test_ct_rate_behind_links_and_with_bad_rows(tmp_path):
    write_ct(tmp_path / "disk/train_1/train_1_a_1.nii.gz")
    data = tmp_path / "data"
    data.mkdir()
    (data / "volumes").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/up").symlink_to(tmp_path / "disk")  # no way without end
    columns = ("VolumeName", "Findings_EN", "Impressions_EN")
    row = ("train_1_a_1.nii.gz", "A nodule.", "Nodule.")
    write_table(data / "train_reports.csv", columns, row)
    assert open_data(str(data), "train", SIZE).read(0).hu.shape == SIZE
    for rows, wanted in (
        ([row, row], "line 3: wanted a row for each volume, got 'train_1_a_1.nii.gz' twice, first in .* line 2"),
        ([row, ("",)], "train_reports.csv line 3: wanted the name of a file as VolumeName, got ''"),
        ([("../x.nii.gz", "a", "b")], "train_reports.csv line 2: wanted the name of a file as VolumeName"),
        ([("train_1_a_1.nii.gz",)], "train_1_a_1.nii.gz: no report"),
    ):
        write_table(data / "train_reports.csv", columns, *rows)
        with pytest.raises(ValueError, match=wanted):
            open_data(str(data), "train", SIZE)


def test_volumes_are_stretched():
    hu = np.repeat(np.repeat(np.arange(4, dtype=np.int16)[:, None, None] * 100, 6, 1), 6, 2)
    small, spacing = fit(hu, (1.0, 1.0, 1.0), (2, 3, 3))
    assert small[:, 0, 0].tolist() == [50, 250] and spacing == [2, 2, 2]
    large, spacing = fit(hu, (1.0, 1.0, 1.0), (8, 6, 6))
    assert spacing == [0.5, 1, 1] and large.shape == (8, 6, 6) and large[0, 0, 0] == 0 and large[3, 0, 0] == 125
    same, _ = fit(hu + 2000, (1.0, 1.0, 1.0), (4, 6, 6))
    assert same.max() == 1000


def test_phantoms():
    source, valid = (open_data("phantoms:40", split, SIZE) for split in ("train", "valid"))
    assert (len(source), len(valid)) == (40, 5)
    item, entry = source.read(3), source.entries[3]
    drawn = phantom(3, draw_names(3), SIZE)
    assert np.array_equal(item.hu, np.clip(drawn.hu, -1000, 1000))
    assert entry.texts == tuple(drawn.wordings(WORDINGS)) and entry.labels == tuple(drawn.labels)
    assert len(set(entry.texts)) > 2
    assert not {e.name for e in source.entries} & {e.name for e in valid.entries}
    counts = np.bincount([len(draw_names(s)) for s in range(400)], minlength=4) / 400
    assert 0.06 < counts[0] < 0.2  # about the share of normals that the table says
    mask = np.zeros((8, 8, 4), np.uint8)
    mask[:2, 0, 0] = ORGANS.index("lung nodule")
    mask[5, 5, 1] = ORGANS.index("arterial wall calcification")
    mask[0, 7, 3] = ORGANS.index("heart")
    assert small_findings(mask)[:, :, 0].tolist() == [[2, 0], [0, 1]]


def test_a_cache_reads_once_and_mends_itself(tmp_path):
    class Counting:
        entries, size, reads = open_data("phantoms:3", "train", SIZE).entries, SIZE, 0

        def __len__(self):
            return 3

        def read(self, index):
            self.reads += 1
            return open_data("phantoms:3", "train", SIZE).read(index)

    source = Counting()
    kept = Cached(source, tmp_path)
    first = kept.read(1)
    again = Cached(source, tmp_path).read(1)
    assert source.reads == 1
    assert np.array_equal(first.hu, again.hu) and np.array_equal(first.small, again.small)
    assert again.spacing == first.spacing
    path = next(kept.folder.glob("*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(kept.read(1).hu, first.hu) and source.reads == 2


def test_latents_are_marked_kept_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("t2ct.train.data.latents.SHARD", 2)
    torch.manual_seed(0)
    vae, cpu = VAE(SMALL.vae).eval(), torch.device("cpu")
    source = open_data("phantoms:3", "train", SIZE)
    options = {"precision": "float32", "quiet": True}
    made = encode_source(source, vae, "one", tmp_path, cpu, **options)
    latent = made.read(2)
    x = torch.from_numpy(source.read(2).hu)[None, None].float()
    mu, sigma = vae.encode((x + 1000) / 2000)
    assert torch.allclose(latent.mu.float(), mu[0], atol=2e-3)
    assert torch.allclose(latent.sigma.float(), sigma[0], atol=2e-3)
    assert latent.small.shape == (4, 4, 4) and made.entries[2].texts == source.entries[2].texts
    first, second = sorted(tmp_path.glob("*.safetensors"))
    kept = first.stat().st_mtime_ns
    wanted = latent.mu.clone()  # the tensor is a view of the file
    second.write_bytes(second.read_bytes()[:50])  # damaged: made again
    encode_source(source, vae, "one", tmp_path, cpu, **options)
    assert first.stat().st_mtime_ns == kept and torch.equal(LatentSource(tmp_path, "one").read(2).mu, wanted)
    with safe_open(second, "pt") as file:
        assert file.metadata()["vae"] == "one"
    with pytest.raises(ValueError, match="wanted those of the VAE two, got .* made by one"):
        LatentSource(tmp_path, "two")
    with pytest.raises(ValueError, match="wanted an empty folder or those of vae two"):
        encode_source(source, vae, "two", tmp_path, cpu, **options)
    with pytest.raises(ValueError, match="wanted an empty folder or those of data"):
        encode_source(open_data("phantoms:4", "train", SIZE), vae, "one", tmp_path, cpu, **options)
    second.unlink()
    with pytest.raises(ValueError, match=f"latents: wanted all shards of .*, got no {second.name}"):
        LatentSource(tmp_path)
    for content in ("{", "[]", '{"format": "t2ct-latents-1"}'):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(ValueError, match="latents: wanted what t2ct latents writes, got .*index.json"):
            LatentSource(tmp_path)
    assert SHARD == 64


def test_latents_read_ahead_are_the_same(tmp_path, monkeypatch):
    """Bits, what is skipped, and what stops: as if every volume had been read when its turn came."""
    monkeypatch.setattr("t2ct.train.data.latents.SHARD", 2)
    torch.manual_seed(0)
    vae, cpu = VAE(SMALL.vae).eval(), torch.device("cpu")

    class Holed(PhantomSource):
        def read(self, index):
            if index == 2:
                raise BadVolume("two: a hole")
            return super().read(index)

    source, told = Holed(5, "train", SIZE), {0: [], 2: []}
    for workers, words in told.items():
        encode_source(source, vae, "one", tmp_path / str(workers), cpu, precision="float32", quiet=True, skip_bad=True,
                      told=words.append, workers=workers)  # fmt: skip
    assert told[0] == told[2] == ["skipped: two: a hole"]
    plain, ahead = (LatentSource(tmp_path / str(workers), "one") for workers in told)
    assert plain.entries == ahead.entries and len(plain) == 5
    # In the hole stands the next volume, with its own report: not that of the one that is missing.
    names = [e.name for e in plain.entries]
    assert names == [f"phantom {i}" for i in (0, 1, 3, 3, 4)] and plain.entries[2].texts == plain.entries[3].texts
    assert torch.equal(plain.read(2).mu, plain.read(3).mu)
    again = encode_source(source, vae, "one", tmp_path / "0", cpu, precision="float32", quiet=True, skip_bad=True)
    assert [e.name for e in again.entries] == names  # kept shards know which volumes they hold
    for i in range(5):
        a, b = plain.read(i), ahead.read(i)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("mu", "sigma", "spacing", "small"))
    with pytest.raises(BadVolume, match="two: a hole .--skip-bad"):
        encode_source(source, vae, "one", tmp_path / "no", cpu, precision="float32", quiet=True, workers=2)


@pytest.mark.parametrize("content", [b'volume,report\n"' + b"x" * 140_000, b"volume,report\n\xff\xfe,a\n"])
def test_a_table_that_does_not_read_is_named(tmp_path, content):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(ValueError, match="manifest.csv: wanted a CSV table in UTF-8, got one that does not read"):
        open_data(str(tmp_path), "train", SIZE)
