"""Words for what is absent or normal."""

from __future__ import annotations

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
    "medical material": ("medical material", "catheter or device"),
    "coronary artery wall calcification": ("coronary artery calcification", "coronary calcified plaques"),
    "hiatal hernia": ("hiatal hernia",),
    "lung opacity": ("ground-glass opacity", "ground-glass opacities"),
    "pulmonary fibrotic sequela": ("fibrotic sequelae", "sequela fibrotic changes"),
    "mosaic attenuation pattern": ("mosaic attenuation pattern", "mosaic attenuation"),
    "peribronchial thickening": ("peribronchial thickening", "bronchial wall thickening"),
    "bronchiectasis": ("bronchiectasis", "bronchiectatic changes"),
    "interlobular septal thickening": ("interlobular septal thickening", "septal thickening"),
}

PLURAL = {
    "pulmonary nodules", "emphysematous changes", "aortic calcifications", "pathologically enlarged lymph nodes",
    "coronary calcified plaques", "ground-glass opacities", "fibrotic sequelae", "sequela fibrotic changes",
    "bronchiectatic changes",
}  # fmt: skip

_AIRWAY = ("bronchiectasis", "peribronchial thickening")
_LUNG = (
    "consolidation", "lung nodule", "emphysema", "atelectasis", "lung opacity", "pulmonary fibrotic sequela",
    "mosaic attenuation pattern", "interlobular septal thickening", *_AIRWAY,
)  # fmt: skip

# Sentences of normal anatomy (variants apart by "|"), each with the findings that would make it untrue.
FILLER: tuple[tuple[tuple[str, ...], str], ...] = (
    (("medical material", *_AIRWAY), "the trachea and main bronchi are patent|trachea and both main bronchi are open"),
    (("lymphadenopathy",), "no lymph nodes of pathological size are seen in the mediastinum"),
    (("hiatal hernia", "medical material"), "the oesophagus is unremarkable"),
    (("hiatal hernia",), "the imaged upper abdominal organs are unremarkable"),
    (("medical material",), "bone structures in the study area are natural"),
    ((), "no lytic or destructive bone lesion"),
    (("medical material", "lymphadenopathy"), "the soft tissues of the chest wall are normal"),
    ((), "the calibre of the pulmonary artery is normal"),
    ((), "thyroid and thoracic inlet are unremarkable"),
    (("arterial wall calcification", "coronary artery wall calcification"),
     "the thoracic aorta is normal|mediastinal main vascular structures are normal"),
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
