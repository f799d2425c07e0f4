"""Documents of runs that were never trained, written by hand after the format: nothing of the package makes them."""

import numpy as np

CAUSES = [
    {"name": "healthy", "letter": "", "color": "#0072B2", "kind": "verdict"},
    {"name": "warming-up", "letter": "W", "color": "#E69F00", "kind": "verdict"},
    {"name": "lagging", "letter": "L", "color": "#D55E00", "kind": "verdict"},
    {"name": "noisy", "letter": "N", "color": "#CC79A7", "kind": "verdict"},
    {"name": "tiny-batch", "letter": "T", "color": "#882255", "kind": "verdict"},
    {"name": "drifting", "letter": "D", "color": "#56B4E9", "kind": "verdict"},
    {"name": "frozen", "letter": "F", "color": "#44AA99", "kind": "verdict"},
    {"name": "non-finite", "letter": "X", "color": "#000000", "kind": "verdict"},
    {"name": "domain-shift", "letter": "V", "color": "#332288", "kind": "flag"},
]
INDEX = {cause["name"]: index for index, cause in enumerate(CAUSES)}
CALM = ("healthy", "drifting", "frozen")
EXPLAINED = {
    "healthy": "The running statistics fit what it receives: 0.021 off all batches of the window, of which their own "
    "sampling noise is 0.015, and 0.028 off the last ones, which are known to 0.012.",
    "warming-up": "The initial zeros and ones still have a weight of 0.774 in the running statistics: eval() is off by "
    "0.929, where sampling noise explains 0.000175.",
    "lagging": "The inputs have moved, and the running statistics have not followed: eval() is off by 0.41.",
    "noisy": "Sampling noise alone makes an error of 0.16: a batch has 12 values per channel, and the momentum is 0.3.",
    "domain-shift": "What it receives in validation is 0.51 off what it receives in training (chance explains 0.031).",
}
REMEDY = {
    "warming-up": "Set `momentum=0.157` (predicted error 0.0249), or train on for 5220 batches, or recompute them "
    "before you evaluate: `lightning_bnmonitor.recalibrate(model, loader)`.",
    "lagging": "Set `momentum=0.21` (predicted error 0.03), or `lightning_bnmonitor.recalibrate(model, loader)`.",
    "noisy": "Set `momentum=0.05`, or larger batches.",
    "domain-shift": "Prepare validation data as training data.",
}
DEFINITIONS = {
    "eval_error": "RMS error of the normalised activation in eval(), with the weights at the window's end",
    "noise_error": "the part of eval_error that is sampling noise of the running statistics",
    "initial_weight": "weight of the initial zeros and ones in the running statistics",
    "severity": "eval_error squared over jitter squared",
}


DIGITS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"))


def planes(words, number):
    """Words of 32 bits, and four zeros, in six digits of 64 each: the first of all, the second of all, and so on."""
    shifted = np.ravel(words).astype(np.int64) * 16
    return "".join("".join(DIGITS[shifted // 64 ** (5 - place) % 64]) for place in range(number))


def words_of(text, count):
    """What `planes` was given, of numbers of any length."""
    place_of = {digit: place for place, digit in enumerate(DIGITS.tolist())}
    digits = np.array([place_of[digit] for digit in text], dtype=np.int64).reshape(-1, max(count, 1))
    words = sum((of_all * 64 ** (5 - place) for place, of_all in enumerate(digits)), np.zeros(count, dtype=np.int64))
    return (words // 16).astype(np.uint32)


def floats(values):
    return planes(np.asarray(values, dtype=np.float32).view(np.uint32), 6)


def bfloats(values):
    """To the nearest that has 16 bits."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    upper = np.where(np.isnan(values), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)
    return planes(upper << 16, 3)


def run_document(names, steps, metrics, causes, *, channels=64, headline=None):
    """A run's document.

    Args:
        names: Of the layers.
        steps: Of the windows.
        metrics: ``(W, L)`` arrays by name.
        causes: ``(W, L)`` names of causes, "" where the layer is not in the window.
    """
    causes = np.asarray(causes, dtype=object).reshape(len(steps), len(names))
    attention = np.array([[bool(cause) and cause not in CALM for cause in row] for row in causes], dtype=bool)
    cells = np.array([[INDEX.get(cause, 255) for cause in row] for row in causes], dtype=np.uint8)
    cells = np.where(attention.reshape(cells.shape), cells + 128, cells)
    texts = list(dict.fromkeys([*EXPLAINED.values(), *REMEDY.values()]))
    error = np.fmax(metrics["eval_error"], metrics.get("val_error", metrics["eval_error"])) if len(steps) else None

    def said(window, layer):
        cause = causes[window, layer]
        if not cause:
            return None
        shifted = "val_shift" in metrics and cause == "warming-up"
        return {
            "cause": INDEX[cause],
            "words": f"{cause}, domain-shift" if shifted else cause,
            "explanation": texts.index(EXPLAINED[cause]) if cause in EXPLAINED else -1,
            "remedy": texts.index(REMEDY[cause]) if cause in REMEDY else -1,
        }

    def latest(layer):
        its = said(len(steps) - 1, layer)
        value = float(f"{metrics['eval_error'][-1, layer]:.4g}")
        number = value if np.isfinite(value) else "NaN" if np.isnan(value) else "Infinity"
        return its and {**its, "evidence": {"eval_error": number, "initial_weight": 0.774, "severity": "Infinity"}}

    def worst(layer):
        known = np.where(causes[:, layer] == "", -1, np.nan_to_num(error[:, layer], nan=-0.5, posinf=1e9))
        window = int(known.argmax())
        its = said(window, layer)
        return its and {**its, "window": steps[window]}

    return {
        "format": 2,
        "prefix": "bn",
        "windows": {"step": list(steps), "headline": [headline or headline_of(row) for row in causes]},
        "layers": {"name": list(names), "type": ["BatchNorm2d"] * len(names), "channels": [channels] * len(names)},
        "causes": CAUSES,
        "thresholds": {"warning": 0.1, "alert": 0.25},
        "cause": planes(cells.astype(np.uint32) << 24, 2),
        "metrics": {name: bfloats(values) for name, values in metrics.items()},
        "latest": {
            "window": len(steps) - 1,
            "text": "the report",
            "layers": [latest(layer) for layer in range(len(names))] if len(steps) else [],
        },
        "worst": {"layers": [worst(layer) for layer in range(len(names))] if len(steps) else []},
        "texts": texts,
        "evidence": DEFINITIONS,
    }


def headline_of(row):
    sick = [cause for cause in row if cause and cause not in CALM]
    if not sick:
        return f"None of {len(row)} BatchNorm layers needs attention."
    counted = ", ".join(f"{sick.count(cause)} {cause}" for cause in dict.fromkeys(sick))
    return f"{len(sick)} of {len(row)} BatchNorm layers need{'s' * (len(sick) == 1)} attention: {counted}."


def channels_document(document, *, seed=0, validated=True, layers=None):
    """The channels of some layers of a run: its sick layers have running statistics far off."""
    rng = np.random.default_rng(seed)
    steps, names = document["windows"]["step"], document["layers"]["name"]
    sets = {}
    for layer, name in enumerate(names):
        if layers is not None and name not in layers:
            continue
        count = document["layers"]["channels"][layer]
        cause = CAUSES[document["latest"]["layers"][layer]["cause"]]["name"]
        share = {"warming-up": 0.774, "lagging": 0.2}.get(cause, 0.0)
        sets[name] = {
            "latest": channel_set(rng, count, steps[-1], share, validated),
            "worst": channel_set(rng, count, document["worst"]["layers"][layer]["window"], max(share, 0.1), validated),
        }
    return {"format": 2, "layers": sets}


def channel_set(rng, count, step, share, validated):
    mean, var = rng.normal(0, 2, count), rng.gamma(4, 0.5, count)
    stderr_mean, stderr_var = 0.02 * np.sqrt(var), 0.03 * var
    running_mean = (1 - share) * mean + stderr_mean * rng.normal(size=count)
    running_var = np.abs((1 - share) * var + share + stderr_var * rng.normal(size=count))
    error = np.sqrt((np.sqrt(var / running_var) - 1) ** 2 + (running_mean - mean) ** 2 / running_var)
    values = {
        "exact_mean": mean,
        "exact_var": var,
        "running_mean": running_mean,
        "running_var": running_var,
        "stderr_mean": stderr_mean,
        "stderr_var": stderr_var,
        "eval_error": error,
    }
    if validated:
        values |= {"val_mean": mean + 0.1 * rng.normal(size=count), "val_var": var * 1.1, "val_error": error * 1.05}
    worst = int(error.argmax())
    batches = [20] * 15 + [7]
    return {
        "step": step,
        "of": count,
        "index": None,
        "values": {name: floats(array) for name, array in values.items()},
        "course": {
            "channel": worst,
            "batches": batches,
            "mean": [float(f"{mean[worst] * (1 + 0.02 * noise):.6g}") for noise in rng.normal(size=16)],
            "var": [float(f"{var[worst] * (1 + 0.05 * noise):.6g}") for noise in rng.normal(size=16)],
        },
    }


def smooth(rng, windows, layers, level, spread=0.25):
    """Positive values that wander slowly about a level."""
    walk = np.cumsum(rng.normal(0, 0.08, (windows, layers)), axis=0)
    return (level * np.exp(spread * rng.normal(size=layers) + walk - walk.mean(axis=0))).astype(np.float32)


def five_layers(windows=12, *, momentum=0.001, seed=0):
    """The example of the front page: ``stem.1`` is warming up, and one of the others is noisy for a while."""
    rng = np.random.default_rng(seed)
    names = ["stem.1", "body.1", "body.4", "body.7", "head.1"]
    steps = [64 * (window + 1) for window in range(windows)]
    error = smooth(rng, windows, 5, 0.028, 0.1)
    left = (1 - momentum) ** np.array(steps)
    error[:, 0] = 1.2 * left + 0.01
    error[3:6, 3] = (0.14, 0.19, 0.12)[: max(windows - 3, 0)]
    causes = np.full((windows, 5), "healthy", dtype=object)
    causes[error[:, 0] > 0.1, 0] = "warming-up"
    causes[3:6, 3] = "noisy"
    noise = smooth(rng, windows, 5, 0.015, 0.1)
    noise[:, 0] = 0.0002
    metrics = {
        "eval_error": error,
        "noise": noise,
        "val_error": error * 1.02 + 0.002,
        "val_shift": smooth(rng, windows, 5, 0.03),
        "batch_jitter": smooth(rng, windows, 5, 0.06),
    }
    return run_document(names, steps, metrics, causes)


def resnet50():
    """Names of the 53 BatchNorm layers of a ResNet-50."""
    names = ["bn1"]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            names += [f"layer{stage}.{block}.bn{number}" for number in (1, 2, 3)]
            if not block:
                names.append(f"layer{stage}.0.downsample.1")
    return names


def healthy(windows=20):
    rng = np.random.default_rng(1)
    names = resnet50()
    metrics = {
        "eval_error": smooth(rng, windows, len(names), 0.02),
        "noise": smooth(rng, windows, len(names), 0.014),
        "val_error": smooth(rng, windows, len(names), 0.022),
        "val_shift": smooth(rng, windows, len(names), 0.02),
    }
    causes = np.full((windows, len(names)), "healthy", dtype=object)
    causes[:3] = "drifting"
    return run_document(names, [100 * (w + 1) for w in range(windows)], metrics, causes, channels=256)


def two_sick_of_53(windows=30):
    """``layer4.1.bn2`` lags since step 640, ``layer2.0.downsample.1`` since step 1600."""
    rng = np.random.default_rng(2)
    names = resnet50()
    steps = [80 * (window + 1) for window in range(windows)]
    error = smooth(rng, windows, len(names), 0.022)
    causes = np.full(error.shape, "healthy", dtype=object)
    causes[:2] = "drifting"
    for name, first, last in (("layer4.1.bn2", 7, 0.93), ("layer2.0.downsample.1", 19, 0.31)):
        layer = names.index(name)
        error[first:, layer] = np.linspace(0.12, last, windows - first)
        causes[first:, layer] = "lagging"
    metrics = {
        "eval_error": error,
        "noise": smooth(rng, windows, len(names), 0.014),
        "val_error": error * 1.03,
        "val_shift": smooth(rng, windows, len(names), 0.03),
        "batch_jitter": smooth(rng, windows, len(names), 0.05),
    }
    metrics["val_error"][::2] = np.nan  # validated after every second window
    return run_document(names, steps, metrics, causes, channels=512)


def thousand_layers(layers=1000, windows=400):
    rng = np.random.default_rng(3)
    names = [
        f"blocks.{i // 20}.unit{i // 4 % 5}.{('conv', 'expand', 'project', 'shortcut')[i % 4]}.bn"
        for i in range(layers)
    ]
    error = smooth(rng, windows, layers, 0.03)
    causes = np.where(error > 0.1, "noisy", "healthy").astype(object)
    for layer in range(37, layers, 190):
        error[windows // 3 :, layer] += np.linspace(0.1, 1.0, windows - windows // 3)
        causes[windows // 3 :, layer] = "lagging"
    metrics = {
        name: smooth(rng, windows, layers, 0.03)
        for name in ("noise", "val_error", "val_shift", "call_shift", "batch_jitter")
    }
    return run_document(names, [50 * (w + 1) for w in range(windows)], {"eval_error": error, **metrics}, causes)


ODD_NAMES = (
    "<b>bold</b>",
    "</script><script>window.broken = true</script>",
    "says \"hello\" & 'bye'",
    "a/b\\c",
    "блок.нормализация",
    "层.归一化.0",
    "emoji.🔥.bn",
    "=SUM(A1:A9), x",
    "{{ template }} ${code} `tick`",
    "constructor.__proto__.toString",
    "very." * 40 + "deep",
    "(root)",
)


def odd_names(windows=3):
    rng = np.random.default_rng(4)
    error = smooth(rng, windows, len(ODD_NAMES), 0.05)
    error[-1, 0], error[-1, 1], error[-1, 2] = np.inf, np.nan, 0.4
    causes = np.full(error.shape, "healthy", dtype=object)
    causes[-1, 0], causes[-1, 2], causes[0, 3] = "non-finite", "lagging", ""
    return run_document(ODD_NAMES, [10 * (w + 1) for w in range(windows)], {"eval_error": error}, causes, channels=3)
