"""Words for what is absent or normal, in the order in which a report goes through the chest."""

from __future__ import annotations

# How each finding is denied; only used when it is absent.
ABSENT: dict[str, tuple[str, ...]] = {
    "pleural effusion": ("pleural effusion", "pleural effusion", "pleural fluid", "pleural effusion or thickening"),
    "pericardial effusion": ("pericardial effusion", "pericardial fluid", "pericardial effusion or thickening"),
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "consolidation": ("consolidation", "airspace consolidation", "focal consolidation"),
    "lung nodule": ("lung nodule", "pulmonary nodules", "suspicious nodule", "nodular lesion"),
    "emphysema": ("emphysema", "emphysematous changes"),
    "atelectasis": ("atelectasis", "atelectatic changes"),
    "arterial wall calcification": ("arterial wall calcification", "aortic calcifications"),
    "pneumothorax": ("pneumothorax",),
    "lymphadenopathy": ("lymphadenopathy", "pathologically enlarged lymph nodes"),
    "medical material": ("medical material", "catheter", "implanted device"),
    "coronary artery wall calcification": ("coronary artery calcification", "coronary calcified plaques"),
    "hiatal hernia": ("hiatal hernia",),
    "lung opacity": ("ground-glass opacity", "ground-glass opacities", "infiltrative lesion"),
    "pulmonary fibrotic sequela": ("fibrotic sequelae", "sequela fibrotic changes"),
    "mosaic attenuation pattern": ("mosaic attenuation pattern", "mosaic attenuation"),
    "peribronchial thickening": ("peribronchial thickening", "bronchial wall thickening"),
    "bronchiectasis": ("bronchiectasis", "bronchiectatic changes"),
    "interlobular septal thickening": ("interlobular septal thickening", "septal thickening"),
}

PLURAL = {
    "pulmonary nodules", "emphysematous changes", "aortic calcifications", "pathologically enlarged lymph nodes",
    "coronary calcified plaques", "ground-glass opacities", "fibrotic sequelae", "sequela fibrotic changes",
    "bronchiectatic changes", "atelectatic changes",
}  # fmt: skip

AIRWAYS = ("bronchiectasis", "peribronchial thickening")
LUNGS = (
    "consolidation", "lung nodule", "emphysema", "atelectasis", "lung opacity", "pulmonary fibrotic sequela",
    "mosaic attenuation pattern", "interlobular septal thickening", *AIRWAYS,
)  # fmt: skip

# The sections of a report: findings that belong there, and sentences for when nothing is wrong: (what must be absent,
# variants).
NORMAL: tuple[tuple[str, tuple[str, ...], tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]], ...] = (
    ("airways", (), (
        (("medical material", *AIRWAYS), (
            "the trachea and main bronchi are patent", "trachea and both main bronchi are open",
            "no occlusive pathology is seen in the trachea and main bronchi", "the central airways are patent",
            "the lumen of the trachea and of both main bronchi is open")),
    )),
    ("devices", ("medical material",), ()),
    ("vessels", ("arterial wall calcification", "coronary artery wall calcification"), (
        (("arterial wall calcification", "coronary artery wall calcification"), (
            "the thoracic aorta is normal", "mediastinal main vascular structures are normal",
            "the aorta and its branches are unremarkable", "mediastinal vascular structures appear natural")),
        ((), (
            "the calibre of the pulmonary artery is normal", "pulmonary artery calibres are within normal limits",
            "the diameter of the thoracic aorta is normal", "calibres of the great vessels are normal")),
    )),
    ("heart", ("cardiomegaly", "pericardial effusion"), (
        (("cardiomegaly",), (
            "heart size is normal", "heart contour and size are normal", "the heart is not enlarged",
            "the heart is of normal size")),
        (("pericardial effusion",), (
            "the pericardium is normal", "pericardial effusion was not observed",
            "no pericardial effusion or thickening was detected", "the pericardium is unremarkable")),
    )),
    ("oesophagus", ("hiatal hernia",), (
        (("hiatal hernia", "medical material"), (
            "the oesophagus is unremarkable", "the calibre of the oesophagus is normal",
            "no tumoral wall thickening is seen in the oesophagus", "thoracic oesophageal calibration is normal")),
    )),
    ("nodes", ("lymphadenopathy",), (
        (("lymphadenopathy",), (
            "no lymph nodes of pathological size are seen in the mediastinum",
            "no enlarged lymph nodes in prevascular, paratracheal, subcarinal or hilar stations were detected",
            "mediastinal and hilar lymph nodes are not enlarged",
            "no lymph node in pathological dimension was observed in the mediastinum and in both axillae")),
    )),
    ("lungs", LUNGS, (
        (LUNGS, (
            "both lungs are clear", "aeration of both lung parenchyma is normal",
            "aeration of both lungs is normal and no infiltrative lesion is detected",
            "the lungs are well aerated without focal abnormality",
            "when examined in the lung window, no active infiltration or mass lesion was detected")),
        (("lung nodule",), (
            "no mass or nodular lesion is detected in the lungs", "a nodule was not observed in either lung")),
    )),
    ("pleura", ("pleural effusion",), (
        (("pleural effusion",), (
            "the pleural spaces are clear", "pleural effusion was not observed",
            "no pleural effusion or thickening was detected", "both pleural spaces are free of fluid")),
        ((), ("no pneumothorax is seen", "pneumothorax was not detected")),
    )),
    ("abdomen", (), (
        (("hiatal hernia", "medical material"), (
            "the imaged upper abdominal organs are unremarkable",
            "upper abdominal organs included in the sections are normal",
            "no space-occupying lesion was detected in the imaged part of the liver",
            "both adrenal glands are normal", "no solid mass is seen in the upper abdomen")),
    )),
    ("bones", (), (
        (("medical material",), (
            "bone structures in the study area are natural", "no lytic or destructive bone lesion is seen",
            "vertebral corpus heights are preserved", "no fracture line is seen in the bone structures")),
        (("medical material", "lymphadenopathy"), (
            "the soft tissues of the chest wall are normal", "chest wall soft tissues appear natural")),
        (("medical material",), ("thyroid and thoracic inlet are unremarkable", "the thyroid gland is normal")),
    )),
)  # fmt: skip

TECHNIQUE = {
    False: (
        "the study is performed without intravenous contrast", "non-contrast images were taken in the axial plane",
        "images were obtained in the axial plane without IV contrast",
        "mediastinal structures were evaluated as suboptimal since the examination was unenhanced",
    ),
    True: (
        "the mediastinal vessels are opacified after intravenous contrast",
        "images were taken in the axial plane after IV contrast",
        "contrast-enhanced images were obtained in the axial plane", "the examination was performed with IV contrast",
    ),
}  # fmt: skip

CLEAN = (
    "normal chest CT",
    "no acute cardiopulmonary abnormality",
    "no significant abnormality",
    "chest CT within normal limits",
    "unremarkable examination",
    "no pathological finding in the chest",
    "normal examination of the thorax",
    "findings within normal limits",
)
