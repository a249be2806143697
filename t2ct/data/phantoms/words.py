"""The vocabulary of the reports. A new finding needs an entry in PHRASES, ABSENT and, if it has sizes, SIZE_WORDS.

Slots: {size} {side} {place} {hemi} {mm}; a slot may be empty. "findings" are sentences, "noun" are noun phrases.
"""

from __future__ import annotations

SIZE_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "pleural effusion": {
        "trace": ("trace", "minimal", "tiny"),
        "small": ("small", "mild", "small-volume"),
        "moderate": ("moderate", "moderate-sized", "medium-sized"),
        "large": ("large", "massive", "large-volume", "extensive"),
    },
    "pericardial effusion": {
        "small": ("small", "mild", "minimal"),
        "moderate": ("moderate", "moderate-sized"),
        "large": ("large", "massive", "marked"),
    },
    "cardiomegaly": {
        "mild": ("mild", "slight", "borderline to mild"),
        "moderate": ("moderate", ""),
        "severe": ("severe", "marked", "gross"),
    },
    "consolidation": {
        "segmental": ("segmental", "focal", "patchy", ""),
        "lobar": ("lobar", "extensive", "dense", "large"),
    },
    "lung nodule": {"small": ("small", ""), "medium": ("", "solid", "round"), "large": ("large", "solid", "")},
    "emphysema": {
        "mild": ("mild", "minimal", "early"),
        "moderate": ("moderate", ""),
        "severe": ("severe", "extensive", "advanced"),
    },
    "arterial wall calcification": {
        "mild": ("mild", "scattered", "minimal"),
        "moderate": ("moderate", ""),
        "severe": ("severe", "extensive", "heavy"),
    },
}

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "pleural effusion": {
        "findings": (
            "there is a {size} {side} pleural effusion",
            "a {size} pleural effusion is seen {hemi}",
            "{size} {side} pleural effusion is present",
            "{size} pleural fluid {hemi}, consistent with pleural effusion",
            "{size} free fluid layers in the {side} pleural space (pleural effusion)",
            "a {size} {side} pleural effusion is observed in the dependent hemithorax",
        ),
        "noun": (
            "{size} {side} pleural effusion",
            "{size} {side} pleural effusion",
            "{size} {side}-sided pleural effusion",
            "{size} pleural effusion {hemi}",
        ),
    },
    "pleural effusion/bilateral": {
        "findings": (
            "there are {size} bilateral pleural effusions",
            "{size} pleural effusions are seen {hemi}",
            "{size} bilateral pleural effusion is present",
            "{size} pleural effusion is observed in both hemithoraces",
            "{size} free fluid is seen in both pleural spaces, in keeping with bilateral pleural effusion",
        ),
        "noun": (
            "{size} bilateral pleural effusions",
            "{size} bilateral pleural effusion",
            "{size} pleural effusions {hemi}",
        ),
    },
    "pericardial effusion": {
        "findings": (
            "there is a {size} pericardial effusion",
            "{size} pericardial effusion is present",
            "{size} fluid surrounds the heart, consistent with pericardial effusion",
            "a {size} circumferential pericardial effusion is seen",
            "{size} fluid in the pericardial sac (pericardial effusion)",
        ),
        "noun": (
            "{size} pericardial effusion",
            "{size} pericardial effusion",
            "{size} fluid around the heart, pericardial effusion",
        ),
    },
    "cardiomegaly": {
        "findings": (
            "the heart is enlarged, {size} cardiomegaly",
            "there is {size} cardiomegaly",
            "{size} cardiomegaly is noted",
            "the cardiothoracic ratio is increased, in keeping with {size} cardiomegaly",
            "heart size is increased ({size} cardiomegaly)",
            "{size} enlargement of the heart, cardiomegaly",
        ),
        "noun": ("{size} cardiomegaly", "{size} cardiomegaly", "{size} cardiomegaly with enlarged heart"),
    },
    "consolidation": {
        "findings": (
            "there is {size} consolidation in {place}",
            "{size} airspace consolidation is seen in {place}",
            "{size} consolidation with air bronchograms in {place}",
            "{size} consolidative opacity is present in {place}",
            "a {size} area of consolidation with surrounding ground-glass is observed in {place}",
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
    "emphysema": {"findings": ("{size} emphysema is seen in both lungs",), "noun": ("{size} emphysema",)},
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
        "noun": ("lobar atelectasis of {place}", "atelectasis of {place}", "collapse of {place}, atelectasis"),
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
    "atelectasis": {"findings": ("atelectasis is seen in {place}",), "noun": ("atelectasis in {place}",)},
    "arterial wall calcification": {
        "findings": (
            "{size} calcified plaques are seen in the aortic wall",
            "there is {size} arterial wall calcification of the thoracic aorta",
            "{size} atherosclerotic wall calcifications in the aorta and its arch",
            "{size} calcific atherosclerosis of the aorta",
            "the aorta shows {size} wall calcifications",
        ),
        "noun": (
            "{size} aortic wall calcification",
            "{size} arterial wall calcification",
            "{size} calcified atherosclerosis of the aorta",
            "{size} aortic calcifications",
        ),
    },
}

# How each finding is denied; only used when it is absent.
ABSENT: dict[str, tuple[str, ...]] = {
    "pleural effusion": ("pleural effusion", "pleural effusion", "pleural fluid"),
    "pericardial effusion": ("pericardial effusion", "pericardial fluid"),
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "consolidation": ("consolidation", "airspace consolidation", "focal consolidation"),
    "lung nodule": ("lung nodule", "pulmonary nodules", "suspicious nodule"),
    "emphysema": ("emphysema", "emphysematous changes"),
    "atelectasis": ("atelectasis",),
    "arterial wall calcification": ("arterial wall calcification", "aortic calcifications"),
    "pneumothorax": ("pneumothorax",),
    "lymphadenopathy": ("lymphadenopathy", "pathologically enlarged lymph nodes"),
}

PLURAL = {"pulmonary nodules", "emphysematous changes", "aortic calcifications", "pathologically enlarged lymph nodes"}

_LUNG = ("consolidation", "lung nodule", "emphysema", "atelectasis")

# Sentences of normal anatomy (variants apart by "|"), each with the findings that would make it untrue.
FILLER: tuple[tuple[tuple[str, ...], str], ...] = (
    ((), "the trachea and main bronchi are patent|trachea and both main bronchi are open"),
    ((), "no lymph nodes of pathological size are seen in the mediastinum"),
    ((), "the oesophagus is unremarkable"),
    ((), "the imaged upper abdominal organs are unremarkable"),
    ((), "bone structures in the study area are natural"),
    ((), "no lytic or destructive bone lesion"),
    ((), "the soft tissues of the chest wall are normal"),
    ((), "the calibre of the pulmonary artery is normal"),
    ((), "thyroid and thoracic inlet are unremarkable"),
    (("arterial wall calcification",), "the thoracic aorta is normal|mediastinal main vascular structures are normal"),
    (("cardiomegaly",), "heart size is normal|heart contour and size are normal|the heart is not enlarged"),
    (("cardiomegaly", "pericardial effusion"), "heart size and pericardium are normal"),
    (("pleural effusion",), "the pleural spaces are clear"),
    (("pericardial effusion",), "the pericardium is normal"),
    (_LUNG, "both lungs are clear|aeration of both lung parenchyma is normal"),
    ((*_LUNG, "pleural effusion"), "the lungs are well aerated without focal abnormality"),
)

CLEAN = (
    "normal chest CT",
    "no acute cardiopulmonary abnormality",
    "no significant abnormality",
    "chest CT within normal limits",
    "unremarkable examination",
    "no pathological finding in the chest",
    "normal examination of the thorax",
)
