"""Networks: what they are given, their heads, and what is asked of them before any long work."""
import copy
import sys

import pytest
import torch
import torchvision
from conftest import refusal
from torch import nn

from kd import architectures, checkpoints, models, own
from kd.classifier import IMAGENET, Classifier
from kd.download import RemoteFile
from kd.files import file_digest
from kd.settings import resolve
from kd.small_conv import SmallInputConv2d

CLASSES = ["cat", "dog", "frog"]
NETWORKS = '''
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    """The mean of 4 feature maps and one linear layer; `end` is what becomes of its output."""
    def __init__(self, classes, channels=3, end=lambda z: z):
        super().__init__()
        self.end, self.conv1, self.fc = end, nn.Conv2d(channels, 4, 3), nn.Linear(4, classes)
    def forward(self, x):
        return self.end(self.fc(self.conv1(x).relu().mean((2, 3))))

def make(num_classes): return Net(num_classes)
def positional(count, width=3, **options): return Net(count)
def lazy(num_classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def three(): return Net(3)
def words(**options): return Net(options['num_classes'])
def four(): return Net(4)
def grey(num_classes): return Net(num_classes, 1)
def softmax(num_classes): return Net(num_classes, end=lambda z: z.softmax(1))
def sigmoid(num_classes): return Net(num_classes, end=lambda z: z.sigmoid())
def log_softmax(num_classes): return Net(num_classes, end=lambda z: z.log_softmax(1))
def pair(num_classes): return Net(num_classes, end=lambda z: (z, z))
def nan(num_classes): return Net(num_classes, end=lambda z: z * torch.nan)
def scaled(num_classes): return Net(num_classes, end=lambda z: 2 * z)
def dropout(num_classes): return Net(num_classes, end=lambda z: F.dropout(z, 0.5))
class Views(Net):
    def __init__(self, classes):
        super().__init__(classes)
        self.fc = nn.Linear(3600, classes)
    def forward(self, x):
        return self.fc(self.conv1(x).view(len(x), -1))
def views(num_classes): return Views(num_classes)
def broken(num_classes): raise RuntimeError("no such layer")
def fails(num_classes): return Net(num_classes, end=lambda z: z.view(7, 7, 7))
def nothing(): return 7
'''


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "nets.py"
    path.write_text(NETWORKS)
    return path


def random_images(count, seed=0, size=32):
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def with_statistics(classifier, count=16):
    """Batch norms that have seen images, and are not alike."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        classifier.train()(random_images(count))
    return classifier.eval()


@pytest.mark.quick
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("options", [
    dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1, bias=False),
    dict(kernel_size=1, stride=2), dict(kernel_size=3, padding="same"),
    dict(kernel_size=3, padding=1, groups=2)])
def test_small_inputs_are_convolved_as_torch_does(size, options):
    torch.manual_seed(0)
    reference = nn.Conv2d(4, 6, **options)
    ours = SmallInputConv2d(4, 6, **options)
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(4, 4, size, size, requires_grad=True)
    gradient = torch.randn_like(reference(images))
    results = []
    for layer in (reference, ours):
        out = layer(images)
        results.append((out, *torch.autograd.grad(out, [images, *layer.parameters()], gradient)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factory", ["make", "grey", "views"])
def test_a_network_of_ones_own_answers_as_it_does_in_pytorch(nets, factory):
    classifier = models.build(f"{nets}:{factory}", CLASSES).eval()
    plain = getattr(own.import_file(nets), factory)(3).eval()
    plain.load_state_dict(classifier.network.state_dict())
    pixels = (random_images(4).permute(0, 3, 1, 2) / 255 * 2 - 1).contiguous()
    if factory == "grey":
        pixels = torchvision.transforms.functional.rgb_to_grayscale(pixels)
    with torch.inference_mode():
        torch.testing.assert_close(classifier(random_images(4)), plain(pixels), rtol=1e-3,
                                   atol=1e-4)
    classifier.train()(random_images(4)).sum().backward()


@pytest.mark.parametrize("arch, head", [
    ("resnet18", "fc"), ("resnet18_cifar", "fc"), ("densenet121", "classifier"), ("resnet20", "fc"),
    ("wrn_16_2", "fc"), ("vgg8_bn", "classifier"),
    ("mobilenet_v3_small", "classifier.3"), ("squeezenet1_1", "classifier.1"), ("googlenet", "fc"),
    ("regnet_x_400mf", "fc"), ("mnasnet0_5", "classifier.1"), ("timm:resnet10t", "fc"),
    ("timm:mobilenetv4_conv_small", "classifier"), ("timm:convnext_atto", "head.fc")])
def test_the_head_of_every_family_is_found_replaced_trained_saved_and_loaded(arch, head, tmp_path):
    if arch.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    torch.manual_seed(0)
    classifier = models.build(arch, CLASSES)
    rows = classifier.network.get_submodule(head).weight
    assert torch.equal(models.head_weight(classifier), rows.detach().flatten(1))
    models.replace_head(classifier, list("abcde"))
    new = classifier.network.get_submodule(head).weight
    answer = with_statistics(classifier).train()(random_images(8))
    answers = answer if isinstance(answer, tuple) else (answer,)
    assert {each.shape for each in answers} == {(8, 5)}
    sum(each.square().mean() for each in answers).backward()
    assert new.grad.abs().sum() > 0
    with torch.no_grad():
        expected = classifier.eval()(random_images(4))
        checkpoints.save(tmp_path / "network.pt", classifier)
        loaded = checkpoints.load(tmp_path / "network.pt")
        assert torch.equal(loaded(random_images(4)), expected) and loaded.classes == list("abcde")


@pytest.mark.quick
@pytest.mark.parametrize("arch, parameters, names", [
    ("resnet20", 278_324, ("conv1", "bn1", "layer3.2.conv2", "layer3.0.downsample.1", "fc")),
    ("resnet110", 1_736_564, ()), ("resnet8x4", 1_233_540, ()), ("resnet32x4", 7_433_860, ()),
    ("wrn_16_2", 703_284, ("block3.layer.1.conv2", "block2.layer.0.convShortcut", "bn1", "fc")),
    ("wrn_40_1", 569_780, ()), ("wrn_40_2", 2_255_156, ()),
    ("vgg8_bn", 3_965_028, ("block4.0", "block4.1", "classifier")),
    ("vgg13_bn_cifar", 9_462_180, ("block0.3", "block0.4", "classifier"))])
def test_networks_of_distillation_papers_have_their_sizes_and_names(arch, parameters, names):
    """Of 100 classes, as Tian et al. (ICLR 2020) count and name them."""
    network = models.build(arch, list(map(str, range(100)))).network
    assert sum(each.numel() for each in network.parameters()) == parameters
    assert {f"{name}.weight" for name in names} <= set(network.state_dict())
    settings = resolve({"teacher_arch": arch, "student_arch": arch})
    assert (settings.teacher_weights, settings.supervised_weights) == ("none", "none")


@pytest.mark.parametrize("factory, found", [
    ("make", True), ("positional", True), ("lazy", True), ("words", True), ("three", True),
    ("log_softmax", True), ("scaled", False)])
def test_only_a_layer_that_makes_the_logits_is_taken_for_the_head(nets, factory, found):
    classifier = models.build(f"{nets}:{factory}", CLASSES)
    assert (models.head_weight(classifier) is not None) == found
    if not found:
        refusal("has no linear layer that makes its logits", models.replace_head, classifier, "ab")


@pytest.mark.parametrize("arch, left", [("resnet18", 0), ("mobilenet_v2", 0), ("densenet121", 62)])
def test_batch_norms_are_folded_where_the_logits_stay_the_same(arch, left):
    torch.manual_seed(0)
    classifier = with_statistics(models.build(arch, CLASSES))
    folded = models.folded(classifier)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
    with torch.no_grad():
        expected = classifier(random_images(32, 1))
        torch.testing.assert_close(folded(random_images(32, 1)), expected, rtol=1e-3,
                                   atol=1e-4 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("computed", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_convolution_whose_weight_is_computed_is_not_folded(computed):
    layers = computed(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 3)
    classifier = with_statistics(Classifier(nn.Sequential(*layers), "own", CLASSES))
    with torch.no_grad():
        expected = classifier.eval()(random_images(4))
        torch.testing.assert_close(models.folded(classifier)(random_images(4)), expected)


def test_a_student_of_the_same_family_inherits_what_its_teacher_has():
    student, stranger = (models.build(arch, CLASSES) for arch in (
        "resnet18", "mobilenet_v3_small"))
    teacher = with_statistics(models.build("resnet34", CLASSES, "none", 32, *IMAGENET))
    assert models.inherit(student, teacher)
    assert student.takes() == teacher.takes() and torch.equal(student.shift, teacher.shift)
    known = teacher.network.state_dict()
    assert all(torch.equal(value, known[name])
               for name, value in student.network.state_dict().items())
    assert not models.inherit(student, models.build("resnet50", CLASSES))   # another head
    before = copy.deepcopy(stranger.state_dict())
    assert not models.inherit(stranger, teacher)
    assert all(torch.equal(value, before[name]) for name, value in stranger.state_dict().items())
    refusal("mobilenet_v3_small can't start from its teacher's weights", models.inherit,
            stranger, teacher, required=True)


@pytest.mark.parametrize("arch, size, said", [
    ("alexnet", 32, "alexnet can't process images of 32x32 pixels.*Use another network or size"),
    ("timm:vit_tiny_patch16_224", 32, "can't process images of 32x32 pixels.*doesn't match"),
    ("resnet19", 32, "There is no network resnet19"),
    ("timm:resnet19", 32, r"timm:resnet19 can't be made \(Unknown model"),
    ("nowhere.py:make", 32, "nowhere.py: no such file"),
    ("{nets}:nobody", 32, "no function nobody"),
    ("{nets}:nothing", 32, "nothing gives a int, not a torch.nn.Module")])
def test_a_network_that_can_not_be_had_is_one_sentence(nets, arch, size, said):
    refusal(said, models.unavailable, [("teacher", arch.format(nets=nets), "none", size)])


def test_weights_in_a_file_are_for_images_of_the_size_given(nets, tmp_path):
    student = models.untrained(f"{nets}:lazy", CLASSES, "none", 48)
    torch.save(student.network.state_dict(), tmp_path / "w.pth")
    assert not models.unavailable([("student", f"{nets}:lazy", str(tmp_path / "w.pth"), None)], 48)


def test_weights_that_do_not_exist_are_a_line_each(nets):
    assert models.unavailable([("student", "resnet18", "IMAGENET1K_V9", None),
                               ("teacher", f"{nets}:make", "imagenet", None)]) == [
        "resnet18 has no weights IMAGENET1K_V9. It has IMAGENET1K_V1, DEFAULT. Or use "
        "--student-weights none.",
        f"There are no ImageNet weights for {nets}:make. Or use --teacher-weights none."]


@pytest.mark.parametrize("arch, options", [
    ("resnet18", {}), ("googlenet", {"transform_input": True, "init_weights": False})])
def test_torchvisions_weights_bring_their_mean_and_deviation(
        tmp_path, monkeypatch, capsys, arch, options):
    """The cache holds a file of our own, since there is none to fetch."""
    theirs, path = torchvision.models.get_model(arch, **options).eval(), tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    preset = torchvision.models.get_model_weights(arch).DEFAULT.transforms()
    remote = RemoteFile(("http://127.0.0.1:9/",), sha256=file_digest(path))
    monkeypatch.setattr(architectures, "_imagenet", lambda *_: (preset, remote, path))
    ours = models.build(arch, CLASSES, "imagenet").eval()
    assert ours.network.fc.out_features == 3
    assert "weights, which take images of 32x32 pixels, mean 0.485," in capsys.readouterr().out
    ours.network.fc = theirs.fc
    with torch.no_grad():
        expected = theirs(torchvision.transforms.functional.normalize(
            random_images(4).permute(0, 3, 1, 2) / 255, preset.mean, preset.std))
        scale = (expected - expected.mean(0)).abs().max()
        assert (ours(random_images(4)) - expected).abs().max() < 1e-2 * scale
    assert models.build(arch, CLASSES, "imagenet", mean=(0.5,) * 3).mean == [0.5] * 3


def test_timms_weights_bring_their_mean_and_deviation(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is an optional extra")
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    theirs.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    timm.models.save_for_hf(theirs, tmp_path / "hub", model_config=None)
    arch = f"timm:local-dir:{tmp_path / 'hub'}"       # as timm:hf-hub:NAME, without a network
    ours = models.build(arch, CLASSES, "imagenet")
    assert (ours.mean, ours.input_size) == ([0.1, 0.2, 0.3], 224)
    assert torch.equal(ours.network.cls_token, theirs.cls_token)
    assert models.build(arch, CLASSES).mean == [0.5] * 3      # random weights state nothing
    assert architectures.usual_pixels(arch)[0] == [0.1, 0.2, 0.3]       # a file of weights neither


def test_what_code_of_the_users_raises_is_shown_as_it_is(nets):
    with pytest.raises(RuntimeError, match="no such layer"):
        models.build(f"{nets}:broken", CLASSES)
    with pytest.raises(RuntimeError, match="shape"):
        models.require_logits(models.build(f"{nets}:fails", CLASSES))


def test_names_of_ours_do_not_shadow_the_users(tmp_path):
    (tmp_path / "data.py").write_text("WIDTH = 5\n")
    (tmp_path / "nets.py").write_text("""
from torch import nn
from data import WIDTH
from mms_threshold import KEEP      # one of ours, where they have none

def make(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, WIDTH), nn.Linear(WIDTH, num_classes))
""")
    import data
    network = models.build(f"{tmp_path}/nets.py:make", CLASSES).network
    assert (network[1].out_features, own.import_file(tmp_path / "nets.py").KEEP) == (5, ">=")
    assert sys.modules["data"] is data


@pytest.mark.parametrize("name, init", [("parts", "from parts.sizes import WIDTH\n"),
                                        ("pieces", None)])
def test_two_files_have_each_what_lies_beside_it(tmp_path, name, init):
    for folder, width in (("a", 4), ("b", 6), ("c", 8)):
        package = tmp_path / folder / name
        package.mkdir(parents=True)
        if init:
            (package / "__init__.py").write_text(init)
        (package / "sizes.py").write_text(f"WIDTH = {width}\n")
        (tmp_path / folder / "nets.py").write_text(f"from {name}.sizes import WIDTH\n")
        assert own.import_file(tmp_path / folder / "nets.py").WIDTH == width


@pytest.mark.quick
@pytest.mark.parametrize("factory, said", [
    ("softmax", "gives probabilities, which add up to 1, not logits"),
    ("sigmoid", "gives the probabilities of a sigmoid, not logits"),
    ("pair", "gives a tuple for three images of 3 classes"),
    ("four", r"gives \(3, 4\) for three images of 3 classes, not"),
    ("nan", "gives NaN or infinity for every image"),
    ("dropout", "gives different answers when asked twice for the same images")])
def test_what_can_not_be_a_teacher_or_learn_is_named_before_any_work(nets, factory, said):
    def question():
        classifier = models.untrained(f"{nets}:{factory}", CLASSES, "none", 32)
        models.question_teacher(classifier, random_images(40).numpy())
    torch.manual_seed(0)
    refusal(f"nets.py:{factory} .*{said}", question)


def test_an_entry_of_a_repository_is_a_network(tmp_path):
    (tmp_path / "hubconf.py").write_text("""
from torch import nn

def wide(num_classes=7):
    return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Flatten(), nn.Linear(64, num_classes))

def fixed():
    return wide(2)
""")
    for entry in ("fixed", "wide"):
        classifier = models.build(f"hub:{tmp_path}:{entry}", ["a", "b"])
        assert models.head_weight(classifier).shape == (2, 64)
    checkpoints.save(tmp_path / "wide.pt", classifier)
    refusal("code runs only where the command line names it", checkpoints.load,
            tmp_path / "wide.pt")
    again = checkpoints.load(tmp_path / "wide.pt", f"hub:{tmp_path}:wide")
    assert torch.equal(again(random_images(2)), classifier.eval()(random_images(2)))
    refusal("hub:/nowhere:wide can't be made", models.build, "hub:/nowhere:wide", ["a", "b"])


@pytest.mark.quick
@pytest.mark.parametrize("arch, images, taken", [
    ("inception_v3", 32, 299), ("inception_v3", 320, 320), ("vit_b_16", 32, 224),
    ("resnet18", 224, 224)])
def test_a_network_is_given_the_size_that_it_needs(arch, images, taken):
    assert architectures.input_size_of(arch, images) == taken
