"""Architectures that others wrote, small enough to be trained in a moment, and batches of unequal sizes for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"  # weights are random: nothing has to come from anywhere
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import transformers

Inputs = Callable[[int], dict[str, Tensor]]
"""What the model receives in a step: batches of unequal sizes."""
Architecture = tuple[nn.Module, Inputs]


def images(size: int, channels: int = 3) -> Inputs:
    return lambda step: {"pixel_values": torch.randn(3 + step % 2, channels, size, size)}


def pairs_of_images(size: int) -> Inputs:
    return lambda step: {"pixel_values": torch.rand(2 + step % 2, 2, 3, size, size)}


def series(length: int) -> Inputs:
    return lambda step: {"past_values": torch.randn(3 + step % 2, length, 2)}


def words(num: int, length: int = 9) -> Tensor:
    return torch.randint(1, 12, (num, length))


def resnet() -> Architecture:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 2, 1, 1])
    return transformers.ResNetForImageClassification(config), images(32)


def regnet() -> Architecture:
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 2, 1, 1], groups_width=4
    )
    return transformers.RegNetForImageClassification(config), images(32)


def mobilenet_v1() -> Architecture:
    config = transformers.MobileNetV1Config(depth_multiplier=0.1, classifier_dropout_prob=0.1)
    return transformers.MobileNetV1ForImageClassification(config), images(32)


def mobilenet_v2() -> Architecture:
    """With the head of DeepLabV3+."""
    config = transformers.MobileNetV2Config(depth_multiplier=0.1, output_stride=8, finegrained_output=False)
    return transformers.MobileNetV2ForSemanticSegmentation(config), images(32)


def efficientnet() -> Architecture:
    config = transformers.EfficientNetConfig(
        width_coefficient=0.1, depth_coefficient=1.0, hidden_dim=128, kernel_sizes=[3, 3, 5], in_channels=[32, 16, 24],
        out_channels=[16, 24, 40], strides=[1, 2, 2], num_block_repeats=[1, 2, 2], expand_ratios=[1, 6, 6],
    )  # fmt: skip
    return transformers.EfficientNetForImageClassification(config), images(32)


def levit() -> Architecture:
    """With BatchNorm over flattened tokens, and in two heads."""
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    return transformers.LevitForImageClassificationWithTeacher(config), images(64)


def mobilevit() -> Architecture:
    """With the head of DeepLabV3."""
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 20, 24], neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 24], num_attention_heads=2,
        expand_ratio=2.0, aspp_out_channels=8,
    )  # fmt: skip
    return transformers.MobileViTForSemanticSegmentation(config), images(64)


def mobilevit_v2() -> Architecture:
    config = transformers.MobileViTV2Config(
        image_size=64, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[16, 24, 32], width_multiplier=0.25
    )
    return transformers.MobileViTV2ForImageClassification(config), images(64)


def cvt() -> Architecture:
    config = transformers.CvtConfig(embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3])
    return transformers.CvtForImageClassification(config), images(32)


def swiftformer() -> Architecture:
    config = transformers.SwiftFormerConfig(depths=[1, 1, 2, 1], embed_dims=[8, 12, 16, 24], drop_path_rate=0.2)
    return transformers.SwiftFormerForImageClassification(config), images(64)


def textnet() -> Architecture:
    config = transformers.TextNetConfig(
        stem_out_channels=8, hidden_sizes=[8, 8, 12, 16, 16], conv_layer_strides=[[1], [2, 1], [2], [1]],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 1]], [[3, 3]]],
    )  # fmt: skip
    return transformers.TextNetForImageClassification(config), images(32)


def hgnet_v2_config() -> Any:
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 16], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 24], stage_num_blocks=[1, 1, 2, 1], stage_numb_of_layers=[2, 2, 2, 2],
        hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1], use_learnable_affine_block=True, out_indices=[2, 3, 4],
    )  # fmt: skip


def hgnet_v2() -> Architecture:
    return transformers.HGNetV2ForImageClassification(hgnet_v2_config()), images(64)


def detector_options() -> dict[str, Any]:
    return {
        "d_model": 16, "encoder_hidden_dim": 16, "encoder_in_channels": [16, 16, 24], "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2, "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_layers": 2,
        "decoder_attention_heads": 2, "num_queries": 6, "num_denoising": 0,
    }  # fmt: skip


def rt_detr_backbone() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], out_indices=[2, 3, 4]
    )


def rt_detr() -> Architecture:
    """With frozen reimplementations of BatchNorm in the backbone, and with BatchNorm after it."""
    config = transformers.RTDetrConfig(backbone_config=rt_detr_backbone(), **detector_options())
    return transformers.RTDetrForObjectDetection(config), images(64)


def rt_detr_v2() -> Architecture:
    config = transformers.RTDetrV2Config(
        backbone_config=rt_detr_backbone(), freeze_backbone_batch_norms=False, **detector_options()
    )
    return transformers.RTDetrV2ForObjectDetection(config), images(64)


def d_fine() -> Architecture:
    config = transformers.DFineConfig(
        backbone_config=hgnet_v2_config(), freeze_backbone_batch_norms=False, **detector_options()
    )
    return transformers.DFineForObjectDetection(config), images(64)


def segformer() -> Architecture:
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=12
    )
    return transformers.SegformerForSemanticSegmentation(config), images(32)


def upernet() -> Architecture:
    """With an auxiliary head that is called, and not trained where there are no labels."""
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[1, 2, 3, 4],
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_in_channels=16, auxiliary_channels=8
    )
    return transformers.UperNetForSemanticSegmentation(config), images(64)


def dpt() -> Architecture:
    """With two layers that it makes and never calls."""
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 12, 12], fusion_hidden_size=8,
        use_batch_norm_in_fusion_residual=True,
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config), images(32)


def vitmatte() -> Architecture:
    backbone = transformers.VitDetConfig(
        image_size=32, pretrain_image_size=32, num_channels=4, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, out_features=["stage2"],
    )  # fmt: skip
    config = transformers.VitMatteConfig(
        backbone_config=backbone, hidden_size=16, convstream_hidden_sizes=[8, 8, 8], fusion_hidden_sizes=[16, 8, 8, 8]
    )
    return transformers.VitMatteForImageMatting(config), images(32, channels=4)


def efficient_loftr() -> Architecture:
    """Of two images each, by blocks whose two or three branches have a BatchNorm each."""
    config = transformers.EfficientLoFTRConfig(
        stage_num_blocks=[1, 1, 1, 1], out_features=[8, 8, 16, 16], hidden_size=16, num_attention_layers=1,
        num_attention_heads=8,
    )  # fmt: skip
    return transformers.EfficientLoFTRModel(config), pairs_of_images(64)


def superglue() -> Architecture:
    """Of two images each, with BatchNorm over the keypoints that a network without any has found."""
    keypoints = transformers.SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8, descriptor_decoder_dim=16, keypoint_threshold=0.0,
        max_keypoints=12,
    )  # fmt: skip
    config = transformers.SuperGlueConfig(
        keypoint_detector_config=keypoints, hidden_size=16, keypoint_encoder_sizes=[8, 16], num_attention_heads=2,
        gnn_layers_types=["self", "cross"], sinkhorn_iterations=3,
    )  # fmt: skip
    return transformers.SuperGlueForKeypointMatching(config), pairs_of_images(32)


def clap() -> Architecture:
    """Of spectrograms: BatchNorm over frequencies, and in a fusion that only some of the samples take."""
    config = transformers.ClapAudioConfig(
        spec_size=64, num_mel_bins=16, patch_size=4, patch_stride=[4, 4], patch_embeds_hidden_size=8, hidden_size=32,
        window_size=2, depths=[1, 1], num_attention_heads=[2, 2], num_hidden_layers=2, enable_fusion=True,
    )  # fmt: skip

    def inputs(step: int) -> dict[str, Tensor]:
        is_longer = torch.tensor([True, False, True, True])[: 3 + step % 2, None]
        return {"input_features": torch.randn(len(is_longer), 4, 60, 16), "is_longer": is_longer}

    return transformers.ClapAudioModel(config), inputs


def wav2vec2_conformer() -> Architecture:
    """With layers that are skipped at random."""
    config = transformers.Wav2Vec2ConformerConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, conv_dim=[8, 8],
        conv_stride=[5, 4], conv_kernel=[10, 4], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        conv_depthwise_kernel_size=7, layerdrop=0.3, mask_time_length=2,
    )  # fmt: skip
    model = transformers.Wav2Vec2ConformerForCTC(config)
    return model, lambda step: {"input_values": torch.randn(3 + step % 2, 1000)}


def parakeet() -> Architecture:
    config = transformers.ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, subsampling_conv_channels=4,
        num_mel_bins=16, layerdrop=0.0,
    )  # fmt: skip
    model = transformers.ParakeetEncoder(config)
    return model, lambda step: {"input_features": torch.randn(3 + step % 2, 96, 16)}


def fastspeech2_conformer() -> Architecture:
    config = transformers.FastSpeech2ConformerConfig(
        hidden_size=16, vocab_size=12, num_mel_bins=8, encoder_layers=1, encoder_linear_units=16, decoder_layers=1,
        decoder_linear_units=16, speech_decoder_postnet_layers=2, speech_decoder_postnet_units=8,
        duration_predictor_channels=8, energy_predictor_channels=8, pitch_predictor_channels=8,
        pitch_predictor_layers=2,
    )  # fmt: skip

    def inputs(step: int) -> dict[str, Tensor]:
        ids = words(3 + step % 2)
        num, length = ids.shape
        return {
            "input_ids": ids,
            "spectrogram_labels": torch.randn(num, 2 * length, 8),
            "duration_labels": torch.full_like(ids, 2),
            "pitch_labels": torch.randn(num, length, 1),
            "energy_labels": torch.randn(num, length, 1),
        }

    return transformers.FastSpeech2ConformerModel(config), inputs


def speecht5() -> Architecture:
    config = transformers.SpeechT5Config(
        vocab_size=12, hidden_size=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, num_mel_bins=8, speaker_embedding_dim=4,
        speech_decoder_prenet_units=8, speech_decoder_postnet_layers=3, speech_decoder_postnet_units=8,
        use_guided_attention_loss=False,
    )  # fmt: skip

    def inputs(step: int) -> dict[str, Tensor]:
        ids = words(3 + step % 2)
        return {
            "input_ids": ids,
            "speaker_embeddings": torch.randn(len(ids), 4),
            "labels": torch.randn(len(ids), 12, 8),
        }

    return transformers.SpeechT5ForTextToSpeech(config), inputs


def patch_tst() -> Architecture:
    """With inputs that are transposed views."""
    config = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=32, patch_length=4, patch_stride=4, num_hidden_layers=2, d_model=16,
        num_attention_heads=2, ffn_dim=16, prediction_length=4, channel_attention=True,
    )  # fmt: skip
    return transformers.PatchTSTForPrediction(config), series(32)


def patch_tsmixer() -> Architecture:
    config = transformers.PatchTSMixerConfig(
        num_input_channels=2, context_length=32, patch_stride=4, num_layers=2, norm_mlp="BatchNorm",
        mode="mix_channel", prediction_length=4,
    )  # fmt: skip
    return transformers.PatchTSMixerForPrediction(config), series(32)


def informer() -> Architecture:
    config = transformers.InformerConfig(
        prediction_length=4, context_length=16, lags_sequence=[1, 2], num_time_features=1, d_model=16,
        encoder_layers=3, encoder_layerdrop=0.0, decoder_layers=1,
    )  # fmt: skip

    def inputs(step: int) -> dict[str, Tensor]:
        num = 3 + step % 2
        return {
            "past_values": torch.randn(num, 18),
            "past_time_features": torch.randn(num, 18, 1),
            "past_observed_mask": torch.ones(num, 18),
            "future_values": torch.randn(num, 4),
            "future_time_features": torch.randn(num, 4, 1),
        }

    return transformers.InformerForPrediction(config), inputs


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "ResNet": resnet,
    "RegNet": regnet,
    "MobileNetV1": mobilenet_v1,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet": efficientnet,
    "LeViT": levit,
    "MobileViT": mobilevit,
    "MobileViTV2": mobilevit_v2,
    "CvT": cvt,
    "SwiftFormer": swiftformer,
    "TextNet": textnet,
    "HGNetV2": hgnet_v2,
    "RT-DETR": rt_detr,
    "RT-DETRv2": rt_detr_v2,
    "D-FINE": d_fine,
    "SegFormer": segformer,
    "UPerNet": upernet,
    "DPT": dpt,
    "ViTMatte": vitmatte,
    "EfficientLoFTR": efficient_loftr,
    "SuperGlue": superglue,
    "CLAP": clap,
    "Wav2Vec2-Conformer": wav2vec2_conformer,
    "Parakeet": parakeet,
    "FastSpeech2Conformer": fastspeech2_conformer,
    "SpeechT5": speecht5,
    "PatchTST": patch_tst,
    "PatchTSMixer": patch_tsmixer,
    "Informer": informer,
}
