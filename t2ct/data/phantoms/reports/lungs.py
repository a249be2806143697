"""Words for what is wrong in the lungs.

Slots: {size} {side} {place} {hemi} {where} {lobe} {kind} {mm} {station} {device} {vessel}; a slot may be empty.
"findings" are sentences, "noun" are noun phrases.
"""

from __future__ import annotations

SIZE_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "consolidation": {
        "segmental": (
            "segmental",
            "focal",
            "patchy",
            "",
        ),
        "lobar": (
            "lobar",
            "extensive",
            "dense",
            "large",
        ),
    },
    "lung nodule": {
        "small": (
            "small",
            "",
        ),
        "medium": (
            "",
            "solid",
            "round",
        ),
        "large": (
            "large",
            "solid",
            "",
        ),
    },
    "emphysema": {
        "mild": (
            "mild",
            "minimal",
            "early",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "extensive",
            "advanced",
        ),
    },
    "lung opacity": {
        "focal": (
            "focal",
            "small",
            "localised",
        ),
        "patchy": (
            "patchy",
            "multifocal",
        ),
        "extensive": (
            "extensive",
            "widespread",
            "diffuse",
        ),
    },
    "pulmonary fibrotic sequela": {
        "mild": (
            "mild",
            "minimal",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "extensive",
            "marked",
        ),
    },
    "mosaic attenuation pattern": {
        "mild": (
            "mild",
            "slight",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "marked",
            "prominent",
        ),
    },
    "peribronchial thickening": {
        "mild": (
            "mild",
            "slight",
            "minimal",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "marked",
            "prominent",
        ),
    },
    "bronchiectasis": {
        "mild": (
            "mild",
            "minimal",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "extensive",
            "advanced",
        ),
    },
    "interlobular septal thickening": {
        "mild": (
            "mild",
            "slight",
            "minimal",
        ),
        "moderate": (
            "moderate",
            "",
        ),
        "severe": (
            "severe",
            "marked",
            "prominent",
        ),
    },
}

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "consolidation": {
        "findings": (
            "there is {size} consolidation in {place}",
            "{size} airspace consolidation is seen in {place}",
            "{size} consolidation with air bronchograms in {place}",
            "{size} consolidated lung is present in {place}",
            "a {size} area of consolidation with blurred margins is observed in {place}",
        ),
        "noun": (
            "{size} consolidation in {place}",
            "{size} {side} {lobe} lobe consolidation",
            "{size} consolidation in {place}, compatible with pneumonia",
            "{size} airspace consolidation of {place}",
        ),
    },
    "lung nodule": {
        "findings": (
            "a {mm} {size} nodule is seen in {place}",
            "there is a {size} nodule measuring {mm} in {place}",
            "{size} pulmonary nodule in {place} measuring {mm}",
            "in {place} there is a {mm} pulmonary nodule",
            "a {size} well-defined nodule with a diameter of {mm} is observed in {place}",
        ),
        "noun": (
            "{size} nodule in {place}",
            "{mm} nodule in {place}",
            "{size} lung nodule in {place}",
            "{mm} pulmonary nodule in {place}",
            "{size} {mm} lung nodule, {place}",
        ),
    },
    "lung nodule/several": {
        "findings": (
            "multiple pulmonary nodules are seen, the largest measuring {mm} in {place}",
            "there are several nodules in the lungs, the largest {mm} in {place}",
            "multiple lung nodules, the largest in {place} with a diameter of {mm}",
        ),
        "noun": (
            "multiple lung nodules, the largest in {place}",
            "multiple pulmonary nodules up to {mm}, the largest in {place}",
            "several nodules, the largest {mm} in {place}",
        ),
    },
    "emphysema/centrilobular": {
        "findings": (
            "{size} centrilobular emphysema is seen, predominantly in the upper lobes",
            "there is {size} emphysema in both lungs, more pronounced in the upper lobes",
            "{size} emphysematous changes with centrilobular emphysema in both lungs",
            "hyperinflated lungs with {size} centrilobular emphysema",
        ),
        "noun": (
            "{size} emphysema",
            "{size} centrilobular emphysema",
            "{size} upper lobe predominant emphysema",
            "{size} emphysema in both lungs",
        ),
    },
    "emphysema/paraseptal": {
        "findings": (
            "{size} paraseptal emphysema with subpleural bullae is seen",
            "there is {size} paraseptal emphysema with apical bullae",
            "{size} bullous emphysema in both upper lobes",
            "subpleural bullae and {size} paraseptal emphysema in both lungs",
        ),
        "noun": (
            "{size} emphysema",
            "{size} paraseptal emphysema",
            "{size} bullous emphysema",
            "{size} paraseptal emphysema with bullae",
        ),
    },
    "emphysema": {
        "findings": ("{size} emphysema is seen in both lungs",),
        "noun": ("{size} emphysema",),
    },
    "atelectasis/linear": {
        "findings": (
            "linear atelectasis is seen in {place}",
            "there are plate-like bands of atelectasis in {place}",
            "subsegmental linear atelectasis in {place}",
            "band atelectasis is present at the base of {place}",
        ),
        "noun": (
            "linear atelectasis in {place}",
            "subsegmental atelectasis in {place}",
            "plate-like atelectasis, {place}",
        ),
    },
    "atelectasis/lobar": {
        "findings": (
            "there is collapse of {place} with volume loss (lobar atelectasis)",
            "lobar atelectasis of {place} is seen",
            "complete atelectasis of {place} with elevation of the hemidiaphragm",
            "{place} shows atelectasis with volume loss",
        ),
        "noun": (
            "lobar atelectasis of {place}",
            "atelectasis of {place}",
            "atelectatic collapse of {place}",
        ),
    },
    "atelectasis/compressive": {
        "findings": (
            "adjacent compressive atelectasis is seen in {place}",
            "there is passive atelectasis in the adjacent lung, {place}",
            "atelectasis of the lung adjacent to the pleural fluid in {place}",
            "compressive atelectasis is present {hemi}",
        ),
        "noun": (
            "adjacent compressive atelectasis",
            "passive atelectasis in {place}",
            "compressive atelectasis {hemi}",
        ),
    },
    "atelectasis": {
        "findings": ("atelectasis is seen in {place}",),
        "noun": ("atelectasis in {place}",),
    },
    "lung opacity": {
        "findings": (
            "{size} ground-glass opacities are observed in {place}",
            "there are {size} ground-glass density increases in {place}",
            "{size} ground-glass opacity is seen in {place}",
            "{size} areas of ground-glass opacity with preserved vessels in {place}",
            "in {place}, {size} hazy ground-glass opacities were observed",
            "{size} infiltrates of ground-glass density are present in {place}",
        ),
        "noun": (
            "{size} ground-glass opacities in {place}",
            "{size} ground-glass opacity, {place}",
            "{size} ground-glass infiltrates in {place}",
            "{size} lung opacity in {place}",
        ),
    },
    "pulmonary fibrotic sequela": {
        "findings": (
            "{size} pleuroparenchymal sequela fibrotic changes are observed in {place}",
            "there are {size} fibrotic sequelae with volume loss in {place}",
            "{size} sequela fibrotic bands are seen in {place}",
            "{size} fibrotic scarring with traction in {place}",
            "{size} fibroatelectatic sequela bands extend to the pleura in {place}",
            "{size} sequela parenchymal densities of fibrotic character are present in {place}",
        ),
        "noun": (
            "{size} fibrotic sequelae in {place}",
            "{size} sequela fibrotic changes, {place}",
            "{size} pleuroparenchymal sequelae in {place}",
            "{size} fibrotic scarring in {place}",
        ),
    },
    "mosaic attenuation pattern": {
        "findings": (
            "{size} mosaic attenuation pattern is observed in both lungs",
            "there is a {size} mosaic attenuation pattern, suggestive of small airway disease",
            "both lungs show {size} mosaic attenuation",
            "{size} mosaic perfusion pattern is seen in both lungs",
            "{size} mosaic density differences are present in both lung parenchyma",
        ),
        "noun": (
            "{size} mosaic attenuation pattern",
            "{size} mosaic attenuation in both lungs",
            "{size} mosaic attenuation, small airway disease",
        ),
    },
    "peribronchial thickening": {
        "findings": (
            "{size} peribronchial thickening is observed {where}",
            "there is {size} bronchial wall thickening {where}",
            "{size} thickening of the bronchial walls is seen {where}",
            "the bronchial walls are thickened {where}, {size} peribronchial thickening",
            "{size} peribronchial cuffing is present {where}",
        ),
        "noun": (
            "{size} peribronchial thickening {where}",
            "{size} bronchial wall thickening {where}",
            "{size} peribronchial cuffing {where}",
        ),
    },
    "bronchiectasis": {
        "findings": (
            "{size} {kind} bronchiectasis is observed in {place}",
            "there are {size} {kind} bronchiectatic changes in {place}",
            "dilated bronchi with signet-ring appearance in {place}, {size} {kind} bronchiectasis",
            "{size} {kind} bronchiectasis with tram-track appearance in {place}",
            "{size} bronchiectatic changes of {kind} type are seen in {place}",
        ),
        "noun": (
            "{size} {kind} bronchiectasis in {place}",
            "{size} bronchiectasis, {place}",
            "{size} bronchiectatic changes in {place}",
        ),
    },
    "interlobular septal thickening": {
        "findings": (
            "{size} interlobular septal thickening is observed {where}",
            "there is {size} thickening of the interlobular septa {where}",
            "{size} smooth septal thickening with Kerley lines {where}",
            "{size} interlobular septal thickenings forming a polygonal network are seen {where}",
            "the interlobular septa are thickened {where}, {size} septal thickening",
        ),
        "noun": (
            "{size} interlobular septal thickening {where}",
            "{size} septal thickening {where}",
            "{size} thickening of the interlobular septa {where}",
        ),
    },
}
