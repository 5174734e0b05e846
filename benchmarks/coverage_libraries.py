"""The networks of other libraries that benchmarks/coverage.py measures: how to construct each, small, and what it takes.

`NETS` has for each library its package, the module that the constructors are in, and by name: a function of that module that
makes the network with random weights, then the shapes of its inputs (tensors, where they are no noise).
"""

import importlib
import importlib.metadata

import torch
from torch import nn

STEPS = torch.tensor([3, 700])  # of a diffusion process
IMAGE, SCAN, VOLUME = (4, 3, 64, 64), (4, 1, 64, 64), (2, 1, 32, 32, 32)
WIDTHS, HALVES = (8, 16, 32), (2, 2)

DECODERS = "Unet UnetPlusPlus FPN PSPNet DeepLabV3 DeepLabV3Plus Linknet MAnet PAN UPerNet Segformer"
ENCODERS = """timm-efficientnet-b0 timm-tf_efficientnet_lite0 timm-skresnet18 mobileone_s0 mit_b0 vgg11_bn densenet121 dpn68
    se_resnet50 xception inceptionv4 tu-mobilenetv3_small_100 tu-regnety_002 tu-resnet18"""
SMP = [f"{decoder} {encoder}" for decoder in DECODERS.split() for encoder in ("resnet18", "mobilenet_v2", "efficientnet-b0")]
SMP += [f"Unet {encoder}" for encoder in ENCODERS.split()] + ["Unet resnet18 scse"]


def _smp(name):
    decoder, encoder, *attention = name.split()
    options = {"decoder_attention_type": attention[0]} if attention else {}
    size = 128 if decoder in ("PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus") else 64
    return (lambda m: getattr(m, decoder)(encoder, encoder_weights=None, classes=2, **options)), (4, 3, size, size)


MONAI = {
    "UNet": (lambda m: m.UNet(2, 1, 2, WIDTHS, HALVES, num_res_units=2), SCAN),
    "UNet batch norm": (lambda m: m.UNet(3, 1, 2, WIDTHS, HALVES, num_res_units=1, norm="batch"), VOLUME),
    "BasicUNet": (lambda m: m.BasicUNet(2, 1, 2, (8, 8, 16, 32, 64, 8)), SCAN),
    "BasicUNetPlusPlus": (lambda m: m.BasicUNetPlusPlus(2, 1, 2, (8, 8, 16, 32, 64, 8)), SCAN),
    "DynUNet": (
        lambda m: m.DynUNet(2, 1, 2, (3, 3, 3, 3), (1, 2, 2, 2), (2, 2, 2), filters=(8, 16, 32, 64), res_block=True),
        SCAN,
    ),
    "DynUNet deep supervision": (
        lambda m: m.DynUNet(3, 1, 2, (3, 3, 3, 3), (1, 2, 2, 2), (2, 2, 2), filters=(8, 16, 32, 64), deep_supervision=True),
        VOLUME,
    ),
    "SegResNet": (lambda m: m.SegResNet(3, 8, 1, 2), VOLUME),
    "SegResNet batch norm": (lambda m: m.SegResNet(2, 8, 1, 2, norm="batch"), SCAN),
    "SegResNetDS": (lambda m: m.SegResNetDS(3, 8, 1, 2), VOLUME),
    "SegResNetVAE": (lambda m: m.SegResNetVAE((32, 32, 32), spatial_dims=3, init_filters=8), VOLUME),
    "VNet": (lambda m: m.VNet(3, 1, 2), VOLUME),
    "AttentionUnet": (lambda m: m.AttentionUnet(2, 1, 2, WIDTHS, HALVES), SCAN),
    "HighResNet": (lambda m: m.HighResNet(3, 1, 2), (2, 1, 16, 16, 16)),
    "DenseNet121": (lambda m: m.DenseNet121(3, 1, 2), VOLUME),
    "EfficientNetBN": (lambda m: m.EfficientNetBN("efficientnet-b0", pretrained=False, in_channels=1, num_classes=5), SCAN),
    "SENet154": (lambda m: m.SENet(2, 1, "se_resnetxt_bottleneck", (1, 1, 1, 1), 32, 16, num_classes=5), SCAN),
    "SEResNet50": (lambda m: m.SEResNet50(spatial_dims=2, in_channels=1, num_classes=5), SCAN),
    "ResNet": (lambda m: m.ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], 3, 1, num_classes=5), VOLUME),
    "ResNet shortcut A": (
        lambda m: m.ResNet("basic", [1, 1, 1, 1], [8, 16, 32, 64], 2, 1, num_classes=5, shortcut_type="A"),
        SCAN,
    ),
    "ResNetFeatures": (lambda m: m.ResNetFeatures("resnet18", pretrained=False, spatial_dims=2), SCAN),
    "AutoEncoder": (
        lambda m: m.AutoEncoder(2, 1, 1, WIDTHS, (2, 2, 2), num_res_units=1, inter_channels=[32], num_inter_units=1),
        SCAN,
    ),
    "VarAutoEncoder": (lambda m: m.VarAutoEncoder(2, (1, 64, 64), 1, 12, WIDTHS, (2, 2, 2)), SCAN),
    "FlexibleUNet": (lambda m: m.FlexibleUNet(3, 2, "efficientnet-b0"), IMAGE),
    "FlexibleUNet resnet18": (lambda m: m.FlexibleUNet(3, 2, "resnet18"), IMAGE),
    "UNETR": (lambda m: m.UNETR(1, 2, (32, 32), 8, 48, 96, 4, spatial_dims=2), (4, 1, 32, 32)),
    "SwinUNETR": (
        lambda m: m.SwinUNETR(1, 2, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), feature_size=12, spatial_dims=2),
        SCAN,
    ),
    "ViTAutoEnc": (
        lambda m: m.ViTAutoEnc(1, (32, 32), (4, 4), hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4, spatial_dims=2),
        (4, 1, 32, 32),
    ),
    "VQVAE": (
        lambda m: m.VQVAE(
            2, 1, 1, (16, 32), 1, (16, 32), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, num_embeddings=32, embedding_dim=8
        ),
        SCAN,
    ),
    "AutoencoderKL": (lambda m: m.AutoencoderKL(2, 1, 1, (1, 1), (16, 32), (False, True), norm_num_groups=8), SCAN),
    "DiffusionModelUNet": (
        lambda m: m.DiffusionModelUNet(2, 1, 1, (1, 1), (16, 32), (False, True), norm_num_groups=8, num_head_channels=8),
        (2, 1, 32, 32),
        STEPS,
    ),
    "ControlNet": (
        lambda m: m.ControlNet(
            2,
            1,
            (1, 1),
            (16, 32),
            (False, True),
            norm_num_groups=8,
            num_head_channels=8,
            conditioning_embedding_num_channels=(16,),
        ),
        (2, 1, 32, 32),
        STEPS,
        (2, 1, 32, 32),
    ),
    "SPADENet": (
        lambda m: m.SPADENet(2, 1, 1, 3, (64, 64), [16, 32], is_vae=False, spade_intermediate_channels=16),
        (2, 3, 64, 64),
    ),
    "SPADEAutoencoderKL": (
        lambda m: m.SPADEAutoencoderKL(
            2, 3, 1, 1, (1, 1), (16, 32), (False, False), norm_num_groups=8, spade_intermediate_channels=16
        ),
        (2, 1, 32, 32),
        (2, 3, 32, 32),
    ),
    "Regressor": (lambda m: m.Regressor((1, 64, 64), (2,), WIDTHS, (2, 2, 2)), SCAN),
    "Discriminator": (lambda m: m.Discriminator((1, 64, 64), WIDTHS, (2, 2, 2)), SCAN),
    "Generator": (lambda m: m.Generator((16,), (32, 8, 8), (32, 16, 1), (2, 2, 1)), (4, 16)),
    "PatchDiscriminator": (lambda m: m.PatchDiscriminator(2, 16, 1), SCAN),
    "MultiScalePatchDiscriminator": (lambda m: m.MultiScalePatchDiscriminator(2, 2, 2, 16, 1, minimum_size_im=64), SCAN),
    "AHNet": (lambda m: m.AHNet((1, 1, 1, 1), 2, 1, 2, psp_block_num=3), (4, 1, 128, 128)),
    "DAF3D": (lambda m: m.DAF3D(1, 2), (1, 1, 32, 32, 32)),
    "HoVerNet": (lambda m: m.HoVerNet("fast", out_classes=3), (2, 3, 256, 256)),
    "GlobalNet": (lambda m: m.GlobalNet([32, 32], 2, 2, 8, 2), (2, 2, 32, 32)),
    "LocalNet": (lambda m: m.LocalNet(2, 2, 8, (0, 1, 2), out_channels=2), (2, 2, 32, 32)),
    "RegUNet": (lambda m: m.RegUNet(2, 2, 8, 2, out_channels=2), (2, 2, 32, 32)),
    "VoxelMorphUNet": (lambda m: m.VoxelMorphUNet(2, 2, 2, (8, 8, 16, 16, 16, 16), (8, 8)), (2, 2, 32, 32)),
    "MedNeXt": (lambda m: m.MedNeXt(2, 8, 1, 2, kernel_size=3), SCAN),
    "Quicknat": (lambda m: m.Quicknat(num_classes=3, num_filters=16), SCAN),
}

KORNIA = {
    "HardNet": (lambda m: m.feature.HardNet(False), (4, 1, 32, 32)),
    "HardNet8": (lambda m: m.feature.HardNet8(False), (4, 1, 32, 32)),
    "HyNet": (lambda m: m.feature.HyNet(False), (4, 1, 32, 32)),
    "SOSNet": (lambda m: m.feature.SOSNet(False), (4, 1, 32, 32)),
    "TFeat": (lambda m: m.feature.TFeat(False), (4, 1, 32, 32)),
    "OriNet": (lambda m: m.feature.OriNet(False), (4, 1, 32, 32)),
    "KeyNet": (lambda m: m.feature.KeyNet(False), SCAN),
    "SOLD2's network": (lambda m: m.feature.SOLD2_detector(False).model, SCAN),
    "XFeatModel": (lambda m: m.feature.XFeatModel(), IMAGE),
    "DISK's Unet": (lambda m: m.feature.DISK().unet, (4, 3, 64, 64)),
    "LoFTR's ResNetFPN": (lambda m: m.feature.LoFTR(None).backbone, SCAN),
    "DeFMO": (lambda m: m.feature.DeFMO(False), (1, 6, 64, 64)),
    "RRDBNet": (lambda m: m.models.RRDBNet(3, 3, num_feat=16, num_block=2, num_grow_ch=8), (4, 3, 32, 32)),
    "TinyViT": (
        lambda m: m.contrib.TinyViT(
            32, num_classes=5, embed_dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 4, 4)
        ),
        (4, 3, 32, 32),
    ),
}

TORCHAUDIO = {
    "ConvTasNet": (lambda m: m.ConvTasNet(2, 16, 32, 3, 16, 32, 3, 2), (2, 1, 800)),
    "Wav2Letter": (lambda m: m.Wav2Letter(10, "mfcc", 13), (2, 13, 60)),
    "Wav2Letter waveform": (lambda m: m.Wav2Letter(10), (1, 1, 8000)),
    "wav2vec2_base's features": (lambda m: m.wav2vec2_base().feature_extractor, (2, 4000), None),
    "wav2vec2 small": (
        lambda m: m.wav2vec2_model(
            "group_norm", [(16, 10, 5), (16, 3, 2)], False, 24, 0.0, 9, 4, 1, 2, 0.0, 48, 0.0, 0.0, False, 0.0, None
        ),
        (2, 800),
    ),
    "wav2vec2 layer norm": (
        lambda m: m.wav2vec2_model(
            "layer_norm", [(16, 10, 5), (16, 3, 2)], True, 24, 0.0, 9, 4, 1, 2, 0.0, 48, 0.0, 0.0, True, 0.0, 10
        ),
        (2, 800),
    ),
    "Conformer": (lambda m: m.Conformer(16, 4, 32, 2, 7), (2, 20, 16), torch.tensor([20, 17])),
    "Conformer group norm": (lambda m: m.Conformer(16, 4, 32, 2, 7, use_group_norm=True), (2, 20, 16), torch.tensor([20, 17])),
    "DeepSpeech": (lambda m: m.DeepSpeech(16, 32, 10), (2, 1, 20, 16)),
    "WaveRNN": (lambda m: m.WaveRNN([2, 2, 3], 16, 12, 2, 16, 16, 5, 8, 16, 16), (2, 1, 60), (2, 1, 8, 9)),
    "Tacotron2": (
        lambda m: m.Tacotron2(
            n_mels=8,
            n_symbol=20,
            symbol_embedding_dim=16,
            encoder_embedding_dim=16,
            decoder_rnn_dim=32,
            attention_rnn_dim=32,
            attention_hidden_dim=16,
            prenet_dim=16,
            postnet_embedding_dim=16,
        ),
        torch.arange(20).reshape(2, 10),
        torch.tensor([10, 8]),
        (2, 8, 12),
        torch.tensor([12, 9]),
    ),
    "Tacotron2's postnet": (lambda m: m.tacotron2._Postnet(8, 16, 5, 5), (4, 8, 30)),
    "HDemucs": (lambda m: m.HDemucs(["a", "b"], channels=8), (1, 2, 32768)),
    "SquimObjective": (lambda m: m.squim_objective_model(32, 16, 16, 2, 16, 1, "LSTM", 20), (2, 2000)),
}

BRAINDECODE = """EEGNet ShallowFBCSPNet Deep4Net EEGNeX EEGConformer EEGInceptionERP EEGInceptionMI EEGITNet EEGTCNet
    EEGSimpleConv ATCNet AttentionBaseNet BDTCN CTNet ContraWR EEGMiner FBCNet FBLightConvNet FBMSNet HybridNet IFNet MSVTNet
    SCCNet SPARCNet SSTDPN SincShallowNet SyncNet TCFormer TIDNet TSception"""
SLEEP = "USleep DeepSleepNet SleepStagerChambon2018 SleepStagerBlanco2020 AttnSleep"


def _braindecode(name):
    asleep = name in SLEEP.split()
    channels, times = (1 if name in ("DeepSleepNet", "AttnSleep") else 2, 3000) if asleep else (22, 1000)
    known = {"n_chans": channels, "n_outputs": 4, "n_times": times, "sfreq": 100 if asleep else 250}
    return (lambda m: getattr(m, name)(**known)), (4, channels, times)


BLOCKS = {"norm_num_groups": 8, "block_out_channels": (16, 32)}
CODERS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, **BLOCKS}
DIFFUSERS = {
    "UNet2DModel": (
        lambda m: m.UNet2DModel(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            **BLOCKS,
        ),
        (2, 3, 32, 32),
        STEPS,
    ),
    "UNet2DModel resnet, scale-shift": (
        lambda m: m.UNet2DModel(
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            layers_per_block=1,
            resnet_time_scale_shift="scale_shift",
            add_attention=False,
            **BLOCKS,
        ),
        (2, 3, 32, 32),
        STEPS,
    ),
    "UNet1DModel": (
        lambda m: m.UNet1DModel(sample_size=256, extra_in_channels=64, block_out_channels=(32, 32, 64)),
        (2, 2, 256),
        STEPS,
    ),
    "UNet2DConditionModel": (
        lambda m: m.UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            layers_per_block=1,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=8,
            **BLOCKS,
        ),
        (2, 4, 16, 16),
        STEPS,
        (2, 5, 12),
    ),
    "UNet3DConditionModel": (
        lambda m: m.UNet3DConditionModel(
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            layers_per_block=1,
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            cross_attention_dim=12,
            attention_head_dim=8,
            **BLOCKS,
        ),
        (2, 4, 4, 16, 16),
        STEPS,
        (2, 5, 12),
    ),
    "ControlNetModel": (
        lambda m: m.ControlNetModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=8,
            conditioning_embedding_out_channels=(16, 32),
            **BLOCKS,
        ),
        (2, 4, 16, 16),
        STEPS,
        (2, 5, 12),
        (2, 3, 32, 32),
    ),
    "AutoencoderKL": (lambda m: m.AutoencoderKL(**CODERS), (2, 3, 32, 32)),
    "AsymmetricAutoencoderKL": (
        lambda m: m.AsymmetricAutoencoderKL(
            down_block_types=CODERS["down_block_types"],
            up_block_types=CODERS["up_block_types"],
            down_block_out_channels=(16, 32),
            up_block_out_channels=(16, 32),
            norm_num_groups=8,
        ),
        (2, 3, 32, 32),
    ),
    "AutoencoderTiny": (
        lambda m: m.AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4),
        (2, 3, 32, 32),
    ),
    "AutoencoderDC": (
        lambda m: m.AutoencoderDC(
            3,
            8,
            8,
            encoder_block_out_channels=(16, 32),
            decoder_block_out_channels=(16, 32),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
        ),
        (2, 3, 32, 32),
    ),
    "AutoencoderOobleck": (
        lambda m: m.AutoencoderOobleck(8, [2, 4], [1, 2], 8, 4, 1),
        (2, 1, 256),
    ),
    "AutoencoderKLTemporalDecoder": (
        lambda m: m.AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32)),
        (2, 3, 32, 32),
    ),
    "VQModel": (lambda m: m.VQModel(num_vq_embeddings=32, **CODERS), (2, 3, 32, 32)),
    "T2IAdapter": (lambda m: m.T2IAdapter(channels=[16, 32], num_res_blocks=1), (2, 3, 64, 64)),
}

YOLO = """yolov3-tiny yolov5n yolov6n yolov8n yolov8n-ghost yolov8n-p2 yolov9t yolov9c yolov10n yolo11n yolo12n yolo26n
    yolo11n-cls yolo11n-seg yolo11n-pose yolo11n-obb"""


def _ultralytics(name):
    kinds = {"cls": "Classification", "seg": "Segmentation", "pose": "Pose", "obb": "OBB"}
    kind = kinds.get(name.rpartition("-")[2], "Detection")
    return (lambda m: getattr(m, f"{kind}Model")(f"{name}.yaml", verbose=False)), (4, 3, 128, 128)


NETS = {
    "smp": ("segmentation-models-pytorch", "segmentation_models_pytorch", {name: _smp(name) for name in SMP}),
    "monai": ("monai", "monai.networks.nets", MONAI),
    "kornia": ("kornia", "kornia", KORNIA),
    "torchaudio": ("torchaudio", "torchaudio.models", TORCHAUDIO),
    "braindecode": ("braindecode", "braindecode.models", {n: _braindecode(n) for n in f"{BRAINDECODE} {SLEEP}".split()}),
    "diffusers": ("diffusers", "diffusers.models", DIFFUSERS),
    "ultralytics": ("ultralytics", "ultralytics.nn.tasks", {name: _ultralytics(name) for name in YOLO.split()}),
}


def names():
    return [f"{library} {name}" for library, (_, _, nets) in NETS.items() for name in nets]


def version(library) -> str:
    return f"{NETS[library][0]} {importlib.metadata.version(NETS[library][0])}"


def load(library):
    return importlib.import_module(NETS[library][1])


def build(library, name):
    """The network and its inputs. What its library makes zero is not, for an output of zeros proves nothing."""
    make, *inputs = NETS[library][2][name]
    model = make(load(library))
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    inputs = tuple(torch.randn(i) if isinstance(i, tuple) else i for i in inputs)
    return model, inputs if len(inputs) > 1 else inputs[0]
