"""A checkpoint, or a run's folder, of a malicious author: what it names is not imported, called, written or asked."""

import copy
import os
import random
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, compose_config, needs
from fault_counts import sized
from omegaconf import OmegaConf

from thaw.run import checkpoint as checkpoints
from thaw.run.errors import UserError

CHECKPOINT = ROOT / "tests" / "checkpoints" / "linear_probe.ckpt"
ROW = "a payload in a checkpoint or a run's folder"
WATCHED = re.compile(
    r"os\.(system|exec|fork|posix_spawn|startfile|remove|rename|rmdir|mkdir|symlink|link|chmod|truncate)"
    r"|subprocess\.|socket\.(connect|bind|getaddrinfo)|shutil\.|urllib\.|ftplib\.|http\.|smtplib\.|webbrowser\.|pty\."
)


class Watch:
    """What this process does while it is on: everything that leaves a trace, seen by Python's audit hook."""

    def __init__(self) -> None:
        self.on, self.seen, self.free = False, list[str](), ()
        sys.addaudithook(self.hook)  # which cannot be removed

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if WATCHED.match(event) or (event == "import" and str(arguments[0]).startswith("canary")):
            self.note(f"{event}{arguments!r}", arguments)
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.note(f"open{arguments!r}", arguments)

    def note(self, what: str, arguments: tuple[Any, ...]) -> None:
        paths = [os.fsdecode(each) for each in arguments if isinstance(each, str | bytes | Path)]
        if not any(path.startswith(self.free) for path in paths):
            self.seen.append(what[:300])

    @contextmanager
    def over(self, *free: Path) -> Iterator[None]:
        """Fail if anything is done, except in these folders."""
        self.seen, self.free, self.on = [], ("/dev/", "/proc/", "git", *map(str, free)), True
        try:
            yield
        finally:
            self.on = False
        assert not self.seen, self.seen


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a listener on this machine, and who has called."""
    calls: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                calls.append("called")
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", calls
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return torch.load(CHECKPOINT, weights_only=True)


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the traces of payloads that ran; a module and a pickle in it would leave one."""
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w').close()\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary", raising=False)
    torch.save(Pickled(str(tmp_path / "RAN")), tmp_path / "pickled.pt")
    return tmp_path


class Pickled:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def payloads(folder: Path, url: str) -> dict[str, Any]:
    """Blocks and values that a configuration may not hold, by what they would do."""
    ran, pickled = str(folder / "RAN"), str(folder / "pickled.pt")
    call = {
        "os.makedirs": {"name": ran},
        "os.system": {"command": f"touch {ran}"},
        "posix.mkdir": {"path": ran},
        "logging.os.system": {"command": f"touch {ran}"},
        "subprocess.getoutput": {"cmd": f"touch {ran}"},
        "subprocess.Popen": {"args": ["touch", ran]},
        "builtins.exec": {"_args_": [f"open({ran!r}, 'w')"]},
        "builtins.eval": {"_args_": [f"open({ran!r}, 'w')"]},
        "builtins.open": {"file": ran, "mode": "w"},
        "io.open": {"file": ran, "mode": "w"},
        "shutil.copy": {"src": "/etc/hostname", "dst": ran},
        "shutil.rmtree": {"path": str(folder / "nothing")},
        "pathlib.Path.touch": {"_args_": [{"_target_": "pathlib.Path", "_args_": [ran]}]},
        "logging.FileHandler": {"filename": ran},
        "urllib.request.urlretrieve": {"url": "file:///etc/hostname", "filename": ran},
        "urllib.request.urlopen": {"url": url},
        "socket.create_connection": {"address": ["127.0.0.1", int(url.rpartition(":")[2])]},
        "runpy.run_path": {"path_name": str(folder / "canary.py")},
        "importlib.import_module": {"name": "canary"},
        "canary.Model": {},
        "torch.load": {"f": pickled, "weights_only": False},
        "torch.save": {"obj": 1, "f": ran},
        "torch.hub.load_state_dict_from_url": {"url": f"{url}/x", "model_dir": ran},
        "torch.utils.cpp_extension.load_inline": {"name": "x", "cpp_sources": "", "build_directory": ran},
        "numpy.load": {"file": pickled, "allow_pickle": True},
        "numpy.save": {"file": ran, "arr": [1]},
        "hydra.utils.get_method": {"path": "canary.Model"},
        "hydra.utils.get_class": {"path": "canary.Model"},
        "hydra.utils.instantiate": {"config": {"_target_": "canary.Model"}},
        "functools.partial": {"_args_": ["canary.Model"]},
        "omegaconf.OmegaConf.save": {"config": {}, "f": ran},
        "thaw.run.config.os.makedirs": {"name": ran},
        "thaw.run.config.build": {"block": {"_target_": "canary.Model"}},
        "thaw.run.files.write_json": {"facts": {}, "path": ran},
        "thaw.run.targets.import_target": {"name": "canary.Model"},
        "thaw.run.checkpoint.torch.load": {"f": pickled, "weights_only": False},
        "thaw.data.mnist.retrieve": {"url": f"{url}/x", "md5": "", "path": ran},
        "thaw.models.backbone.timm.models.load_checkpoint": {"checkpoint_path": pickled},
        "thaw.run.loggers.RunWandb": {"save_dir": ran, "settings": {"base_url": url}},
        "thaw.run.trackers.mlflow_logger": {"dir": ran, "tracking_uri": url},
        "thaw.run.trackers.RunMLflow": {"tracking_uri": url},
        "lightning.pytorch.loggers.TensorBoardLogger": {"save_dir": ran},
        "lightning.pytorch.loggers.CSVLogger": {"save_dir": ran},
        "lightning.Trainer": {"default_root_dir": ran},
        "lightning.pytorch.callbacks.ModelCheckpoint": {"dirpath": ran},
        "torch.optim.os.makedirs": {"name": ran},
        "torch.optim.swa_utils.AveragedModel": {},
        "timm.optim.create_optimizer_v2": {},
        "timm.optim.optim_factory.torch.load": {"f": pickled},
        "optuna.storages.RDBStorage": {"url": f"sqlite:///{ran}"},
        "": {},
    }
    blocks: dict[str, Any] = {name or "no name": {"_target_": name, **rest} for name, rest in call.items()}
    make = {"_target_": "os.makedirs", "name": ran}
    blocks |= {
        "partial": make | {"_partial_": True},
        "not recursive": {"_target_": "torch.nn.Identity", "_recursive_": False, "x": make},
        "in a list": [1, [make]],
        "in the arguments of an optimizer": {"_target_": "torch.optim.SGD", "_args_": [[make]]},
        "in a setting of an optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "momentum": make},
        "arguments without names": {"_target_": "thaw.models.heads.LinearHead", "_args_": [1, 1, "none"]},
        "a target that is a list": {"_target_": ["os.makedirs"], "name": ran},
        "a target that is a mapping": {"_target_": {"_target_": "os.makedirs"}, "name": ran},
        "a target that is a reference": {"_target_": "${evil}", "name": ran},
        "a target of two references": {"_target_": "os.${evil}", "name": ran},
        "a target of bytes": {"_target_": b"os.makedirs", "name": ran},
        "oc.env": "${oc.env:HOME}",
        "oc.create": f"${{oc.create:{{_target_: os.makedirs, name: {ran}}}}}",
        "oc.decode": f"${{oc.decode:'{{_target_: os.makedirs, name: {ran}}}'}}",
        "oc.select": f"${{oc.select:none,{{_target_: os.makedirs, name: {ran}}}}}",
        "a reference in a reference": "${${oc.env:HOME}}",
        "an escaped reference": "\\${oc.env:HOME}",
        "hydra": "${hydra:runtime.cwd}",
        "a tensor": torch.zeros(3),
        "a set": {1, 2},
    }
    return blocks


PLACES = [("head",), ("model", "optim"), ("model", "freeze", "add"), ("backbone", "arguments", "x"), ("trainer", "x")]


def put(config: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a configuration with another value at a place."""
    changed = node = copy.deepcopy(config)
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return changed


@pytest.fixture
def readers(good: dict[str, Any], tmp_path: Path) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What the commands do with a file whose configuration is given: all ways into thaw, up to a built model."""
    from thaw.evaluation.evaluate import test_run
    from thaw.evaluation.probe_run import checkpoint_backbone
    from thaw.freezing.start_from import start_from
    from thaw.predict.predictor import load_predictor
    from thaw.run.resume import find_saved, read_config, resumed_config

    run = tmp_path / "run"
    file = run / "checkpoints" / "best.ckpt"
    file.parent.mkdir(parents=True)
    probe = compose_config("probe", f"ckpt={file}", "run_dir=x", "name=x", "overrides=''")
    resumed = compose_config("train", f"resume={file}", "run_dir=x", "overrides=''")

    def saved(config: dict[str, Any]) -> Path:
        torch.save({**good, "config": config}, file)
        return file

    def folder(config: dict[str, Any]) -> Path:
        (run / "config.yaml").write_text(yaml.safe_dump(config))  # fails for what YAML cannot hold
        return run / "config.yaml"

    return {
        "eval, predict, export, serve, load": lambda config: load_predictor(str(saved(config)), accelerator="cpu"),
        "probe": lambda config: checkpoint_backbone(probe.copy(), [f"ckpt={saved(config)}"]),
        "train resume=<file>": lambda config: resumed_config(resumed.copy(), [f"resume={saved(config)}"]),
        "train resume=<folder>": lambda config: find_saved(str(folder(config).parent), "", []),
        "train start_from=": lambda config: start_from(None, saved(config), []),
        "a comparison's page": lambda config: read_config(folder(config), []),
        "the test of a sweep's winner": lambda config: test_run(saved(config).parents[1], [], OmegaConf.create()),
    }


def test_no_payload_runs(
    tries: Any, watch: Watch, server: tuple[str, list[str]], good: dict[str, Any], readers: dict[str, Any], canary: Path
) -> None:
    """Each in each place, through each way; in the short suite one place and one way each."""
    url, calls = server
    config = checkpoints.read_checkpoint(CHECKPOINT)["config"]
    with tries(ROW, harm="let in") as attempt:
        for number, (name, block) in enumerate(payloads(canary, url).items()):
            for turn, (way, read) in enumerate(readers.items()):
                for place in PLACES:
                    if sized(1, 0) and (turn, place) != (number % len(readers), PLACES[number % len(PLACES)]):
                        continue
                    with attempt(f"{name} at {'.'.join(place)} by {way}"):
                        changed = put(config | {"evil": "makedirs"}, place, block)
                        with watch.over(canary / "run"):
                            refuses(read, changed)
                        assert not (canary / "RAN").exists() and "canary" not in sys.modules and not calls


def refuses(read: Callable[[Any], Any], *arguments: Any) -> None:
    """Whether a file is refused by an error that tells it; YAML has no tensors, sets or bytes."""
    with pytest.raises((UserError, yaml.YAMLError)) as caught:
        read(*arguments)
    assert not isinstance(caught.value, yaml.YAMLError) or "represent" in str(caught.value)


OTHERS = "others.txt"


def written_elsewhere(outside: Path, url: str) -> dict[tuple[str, ...], Any]:
    """Settings that would write, send or fetch outside of a run's folder, by their places in its configuration."""
    place = str(outside / "RAN")
    return {
        ("run_dir",): place,
        ("allow",): ["os", "canary"],
        ("hydra",): {"run": {"dir": place}},
        ("cache", "dir"): place,
        ("data", "mirrors"): [url],
        ("callbacks", "checkpoint", "dirpath"): place,
        ("callbacks", "checkpoint", "filename"): f"../../../{outside.name}/RAN",
        ("callbacks", "last_checkpoint", "dirpath"): f"${{run_dir}}/../../{outside.name}",
        ("callbacks", "last_checkpoint", "filename"): f"{outside}/RAN",
        ("callbacks", "test_report", "run_dir"): place,
        ("callbacks", "lr_curve", "run_dir"): place,
        ("callbacks", "preemption", "run_dir"): place,
        ("trainer", "default_root_dir"): place,
        ("trainer", "profiler"): {"_target_": "thaw.callbacks.run_profile.RunProfile", "run_dir": place},
        ("logger",): {
            "csv": {
                "_target_": "thaw.run.csv_log.RunCSV",
                "save_dir": place,
                "name": f"../{outside.name}",
                "version": "..",
                "flush_logs_every_n_steps": 1,
                "resume": None,
            },
            "tensorboard": {
                "_target_": "lightning.pytorch.loggers.TensorBoardLogger",
                "save_dir": "${name}",
                "name": outside.name,
                "version": place,
                "default_hp_metric": False,
            },
        },
    }


def test_a_resumed_run_writes_in_its_own_folder(
    tries: Any,
    tmp_path: Path,
    tiny_run: list[str],
    train: Callable[..., Path],
    server: tuple[str, list[str]],
    watch: Watch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever paths and addresses its file names; nor does it load, copy or remove the files that a state names."""
    import train as script
    from thaw.run.resume import resumed_config

    url, calls = server
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / OTHERS).write_text("secret")
    file = train(*tiny_run, "trainer.max_epochs=1", "cache.mode=off") / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    for place, value in written_elsewhere(outside, url).items():
        checkpoint["config"] = put(checkpoint["config"], place, value)
    for state in checkpoint["callbacks"].values():
        if "best_model_path" in state:
            state["best_model_path"] = str(outside / OTHERS)
            state["best_k_models"] = {str(outside / OTHERS): torch.tensor(0.0)}
            state["kth_best_model_path"] = state["last_model_path"] = f"{file.parent}/../../../../outside/{OTHERS}"
    with tries("a path or an address in a checkpoint, resumed", harm="let in") as attempt:
        for name, epochs in (("longer", 2), ("ended", 1))[: sized(1, 2)]:
            if name == "ended":  # nothing is trained: the best weights are those that the state names
                checkpoint["config"]["callbacks"]["checkpoint"] = None
                for state in checkpoint["callbacks"].values():
                    if "best_model_path" in state:
                        state["best_model_path"] = f"{url}/weights.pt"
            torch.save(checkpoint, file)
            run = tmp_path / "runs" / "test" / name
            typed = [f"resume={file}", f"trainer.max_epochs={epochs}"]
            with attempt(name), watch.over(run, Path.cwd() / "logs", tmp_path / "cache"):
                cfg = resumed_config(compose_config("train", *typed, f"run_dir={run}", "overrides=''"), typed)
                script.main(cfg)
            said = capsys.readouterr().out
            with attempt(f"{name}: what is left"):
                assert [path.name for path in outside.iterdir()] == [OTHERS] and not calls
                assert "secret" not in "".join(p.read_text("latin1") for p in run.rglob("*") if p.is_file())
                assert f"cache.dir={outside / 'RAN'}" in said and "not followed" in said
                assert cfg.allow == [] and "hydra" not in cfg
                assert (run / "summary.json").is_file()


ALLOWED = re.compile(r"thaw\.[\w.]+|(torch|timm)\.optim(\.\w+)?\.[A-Z]\w*")


FAMILIAR = [
    *("thaw.models.heads.LinearHead", "thaw.models.backbone.Backbone", "torch.optim.SGD", "thaw.classifier.Classifier"),
    *("thaw.run.trackers.mlflow_logger", "lightning.Trainer", "thaw.freezing.cache.FeatureCache"),
]
REFERENCES = [
    *("${model}", "${backbone}", "${..}", "${.}", "${callbacks}", "${x.y}", "${oc.env:HOME}", "${", "\\${seed}"),
    *("${seed}", "${oc.select:none,1}", "${oc.select:x,${y}}", "???", "${head.norm}", "a ${name} b"),
]
VALUES: list[Any] = [
    *(None, True, 0, -1, 10**30, 10**9, 1e308, float("nan"), "", "hub", "../..", "/", b"x", "\x1b[2J", "\ud800"),
    *([], {}, [[[]]], {"": {}}, {"a.b": 1}, {1: 2}, {None: 1}, (1, 2), {"_target_": None}),
]


def importable() -> list[str]:
    """Names of what the modules of this process hold: thousands of functions and classes of every kind."""
    modules = [(name, module) for name, module in sorted(sys.modules.items()) if not name.startswith(("_", "test"))]
    return [
        f"{name}.{each}" for name, module in modules for each, value in sorted(vars(module).items()) if callable(value)
    ]


def mutated(config: dict[str, Any], random: random.Random, names: list[str]) -> dict[str, Any]:
    """A copy of a configuration with one to three random changes."""
    config = copy.deepcopy(config)
    for _ in range(random.randint(1, 3)):
        node: Any = config
        while True:
            key = random.choice([*node] if isinstance(node, dict) else range(len(node)))
            if not (isinstance(node[key], dict | list) and node[key]) or random.random() < 0.2:
                break
            node = node[key]
        name = random.choice(names) if random.random() < 0.5 else random.choice([*FAMILIAR, *map(str, sys.modules)])
        values = [
            {"_target_": name},
            {"_target_": name, "_partial_": random.choice([True, False, "x"]), **random.choice([{}, {"x": node}])},
            {"_target_": name, "_args_": [1]},
            [{"_target_": name}],
            random.choice(REFERENCES),
            random.choice(VALUES),
        ]
        if isinstance(node, dict) and random.random() < 0.3:
            node[random.choice(["_target_", "_args_", "_partial_", "_recursive_", "_convert_", "x", "dir"])] = name
        else:
            node[key] = copy.deepcopy(random.choice(values))
    return config


def test_configurations_at_random(
    tries: Any,
    watch: Watch,
    good: dict[str, Any],
    readers: dict[str, Callable[[dict[str, Any]], Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mutants of a good configuration are built, or refused by an error that tells why; nothing else is called."""
    from hydra._internal.instantiate import _instantiate2 as hydra

    located: list[str] = []
    locate = hydra._locate
    monkeypatch.setattr(hydra, "_locate", lambda name: located.append(name) or locate(name))
    config, names, draw = checkpoints.read_checkpoint(CHECKPOINT)["config"], importable(), random.Random(22)
    load, *others = readers.values()
    with tries("a configuration that is mutated at random", harm="let in") as attempt:
        for number in range(sized(12, 600)):
            changed = mutated(config, draw, names)
            before = {name for name in sys.modules if "." not in name}
            located.clear()
            with attempt(f"mutant {number} of seed 22"), watch.over(tmp_path):
                with suppress(UserError):
                    (others[number % 2] if number % 4 == 0 else load)(changed)
                wrong = [name for name in located if not ALLOWED.fullmatch(name)]
                new = {name for name in sys.modules if "." not in name} - before
                assert not wrong and not new & {name.partition(".")[0] for name in names}, (wrong, new)


def deep(levels: int) -> dict[str, Any]:
    return {"x": deep(levels - 1)} if levels else {}


def shared(levels: int) -> Any:
    """Nested lists of two, in which each stands twice: 2 ** levels values in a few bytes."""
    value: Any = 0
    for _ in range(levels):
        value = [value, value]
    return value


def test_odd_values_are_refused(
    tries: Any, watch: Watch, good: dict[str, Any], readers: dict[str, Callable[[dict[str, Any]], Any]], canary: Path
) -> None:
    """By eval.py and the others that build the model; in seconds, and in little memory."""
    config, load = checkpoints.read_checkpoint(CHECKPOINT)["config"], next(iter(readers.values()))
    pickled = str(canary / "pickled.pt")
    odd: dict[str, tuple[tuple[str, ...], Any]] = {
        "a file that timm would load": (("backbone", "arguments", "checkpoint_path"), pickled),
        "weights that timm would fetch": (("backbone", "arguments", "pretrained_cfg"), {"url": "http://127.0.0.1:1"}),
        "a huge model": (("backbone", "arguments", "embed_dim"), 6 * 10**4),
        "a huge number of classes": (("model", "num_classes"), 10**9),
        "a pattern of exponential time": (("freeze", "rules"), [{"match": "([a-z._]+)+!", "train": True}]),
        "a pattern in a list": (("freeze", "rules"), [{"match": ["(x|x)*y", "((a*b)?)*"], "train": True}]),
        "a nesting of 200 levels": (("mix", "x"), deep(200)),
        "a thousand million values": (("mix", "x"), shared(30)),
        "a reference to itself": (("model", "optim"), "${model}"),
        "a weights file that is no file": (("backbone", "weights"), "/dev/zero"),
    }
    with tries("an odd value in a checkpoint", harm="let in") as attempt:
        for name, (place, value) in odd.items():
            with attempt(name), watch.over(canary), pytest.raises(UserError):
                load(put(config, place, value))
        for name, value in {
            "wandb_id": "../../x",
            "wandb_id ": "a/b",
            "wandb_id  ": "\x1b]0;x\x07",
            "wandb_id   ": {"_target_": "os.makedirs"},
            "tracker_ids": {"mlflow": "${oc.env:HOME}"},
            "tracker_ids ": ["x"],
        }.items():
            with attempt(f"{name}={value!r}"), pytest.raises(UserError):
                torch.save({**good, name.strip(): value}, canary / "ids.ckpt")
                checkpoints.read_checkpoint(canary / "ids.ckpt")


def test_what_a_folder_names(tries: Any, good: dict[str, Any], canary: Path) -> None:
    """The config.yaml of a run without a checkpoint does not decide what is allowed, nor the folder of the next run."""
    from thaw.callbacks.run_record import forget_others
    from thaw.run.folders import run_name
    from thaw.run.resume import resumed_config

    config = checkpoints.read_checkpoint(CHECKPOINT)["config"]
    torch.save({**good, "config": put(config, ("head",), {"_target_": "canary.Model"})}, canary / "start.ckpt")
    run = canary / "killed"
    run.mkdir()
    typed = [f"resume={run}"]
    composed = compose_config("train", *typed, "run_dir=x", "overrides=''")
    given = {**config, "allow": ["canary"], "resume": None, "start_from": str(canary / "start.ckpt"), "name": ".."}
    with tries("a path or an address in a checkpoint, resumed", harm="let in") as attempt:
        with attempt("allow"):
            (run / "config.yaml").write_text(yaml.safe_dump(given))
            cfg = resumed_config(composed.copy(), typed)
            assert cfg.allow == [] and "canary" not in sys.modules
        with attempt("paths in a callback's state"):
            own, other = str(run / "config.yaml"), str(canary / "start.ckpt")
            (run / "link.ckpt").symlink_to(other)
            for path in (other, f"{run}/../start.ckpt", str(run / "link.ckpt"), "http://127.0.0.1:1/x", "", None):
                state = {"best_model_path": path, "best_k_models": {path: 1.0, own: 0.5}, "last_model_path": own}
                forget_others(state, run)
                left = {"best_model_path": "", "best_k_models": {own: 0.5}, "last_model_path": own}
                assert state == left | {"kth_best_model_path": ""}, path
        with attempt("the name of the folder"):
            root = {"name": "own", "resume": str(run), "allow": [], "hydra": {"overrides": {"task": typed}}}
            for name in ("..", ".", "/", "a\x1b[2J", "..\\x"):
                (run / "config.yaml").write_text(yaml.safe_dump(given | {"name": name}))
                assert run_name(OmegaConf.create(root)) == "own"
        with attempt("aliases"), pytest.raises(UserError, match="aliases"):
            lines = ["x0: &x0 [1, 1]", *(f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]" for n in range(1, 40))]
            (run / "config.yaml").write_text(yaml.safe_dump(given) + "\n".join(lines))
            resumed_config(composed.copy(), typed)


def test_a_terminal_obeys_no_file(
    tries: Any, good: dict[str, Any], canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, commits and messages from a file are shown without the codes that move a cursor or set a title."""
    from rich.table import Table

    from thaw.run import console
    from thaw.run.command import shown_errors

    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"
    config = checkpoints.read_checkpoint(CHECKPOINT)["config"]
    torch.save({**good, "git_commit": evil, "config": config | {"name": evil, "overrides": evil}}, canary / "evil.ckpt")
    with tries("a control code for the terminal in a checkpoint", harm="let in") as attempt:
        with attempt("the line about its origin"):
            console.say(checkpoints.origin(checkpoints.read_checkpoint(canary / "evil.ckpt")))
        with attempt("a table"):
            table = Table("name")
            table.add_row(evil)
            console.say_fitted(table)
        with attempt("an error"), pytest.raises(SystemExit), shown_errors():
            checkpoints.checked_config(put(config, ("head",), {"_target_": "thaw.gone.X" + evil}), Path("x"), [], evil)
        with attempt("the name of a class"), pytest.raises(UserError, match="classes"):
            from thaw.predict.predictor import checked_record

            record = {"name": "x", "origin": "", "shape": (1, 28, 28), "reader": "digit"}
            checked_record({**record, "classes": ["a", evil]}, Path("x"))
        with attempt("all of them"):
            printed = "".join(capsys.readouterr())
            assert printed.count("x1b]0;title") >= 3 and not set(evil) & set("\x1b\x07\x9b\u202e") & set(printed)


@needs("sweeps")
def test_a_study_is_input(tries: Any, canary: Path) -> None:
    """Stored trials hold only what their search could have drawn, and a stored state of CMA-ES calls nothing."""
    import pickle

    import cmaes
    import numpy as np
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from thaw.sweeps.space import check_params
    from thaw.sweeps.study import loads_cmaes

    space = {"optim.lr": FloatDistribution(1e-4, 1.0, log=True), "freeze": CategoricalDistribution(["full", "lora"])}
    space["backbone.k"] = IntDistribution(1, 4)
    check_params({"optim.lr": 0.1, "freeze": "lora", "backbone.k": 4}, space)
    with tries("a payload in a study of a search", harm="let in") as attempt:
        for params in (
            {"+callbacks.x._target_": "os.system"},
            {"optim.lr": "0.1 +callbacks.x={_target_:os.system}"},
            {"optim.lr": 2.0},
            {"optim.lr": float("nan")},
            {"freeze": "full,lora"},
            {"hydra.run.dir": "/"},
            {"backbone.k": None},
        ):
            with attempt(str(params)), pytest.raises(UserError, match="stored trial"):
                check_params(params, space)
        with attempt("a pickle"), pytest.raises(UserError, match="not run"):
            loads_cmaes(pickle.dumps(Pickled(str(canary / "RAN"))))
        with attempt("the pickle of today's state"):
            state = cmaes.CMA(mean=np.ones(2), sigma=1.0)
            assert (loads_cmaes(pickle.dumps(state)).mean == state.mean).all()
        assert not (canary / "RAN").exists()
