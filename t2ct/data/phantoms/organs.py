"""Names and numbers of what a phantom's masks hold."""

# `Phantom.mask`: whole organs and findings. Numbers never change; new names go to the end.
ORGANS = (
    "background", "fat", "muscle", "bone", "right lung", "left lung", "airway", "heart", "aorta", "pulmonary vessels",
    "vena cava", "oesophagus", "liver", "spleen", "stomach", "breast", "table", "pleural effusion",
    "pericardial effusion", "consolidation", "lung nodule", "emphysema", "atelectasis", "arterial wall calcification",
    "medical material", "coronary artery wall calcification", "hiatal hernia", "lymphadenopathy", "lung opacity",
    "pulmonary fibrotic sequela", "mosaic attenuation pattern", "peribronchial thickening", "bronchiectasis",
    "interlobular septal thickening", "cardiomegaly", "skin", "spinal canal", "diaphragm", "bowel", "right kidney",
    "left kidney", "adrenal glands", "gallbladder", "thyroid", "coronary arteries", "lymph nodes", "azygos vein",
)  # fmt: skip

# `Phantom.parts`: a second map, of what the organs consist of.
PARTS = (
    "none", "right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe",
    "trachea", "right main bronchus", "left main bronchus", "lobar bronchi", "segmental bronchi",
    "left ventricle", "right ventricle", "left atrium", "right atrium", "myocardium", "ascending aorta", "aortic arch",
    "descending aorta", "supra-aortic arteries", "pulmonary trunk", "right pulmonary artery", "left pulmonary artery",
    "pulmonary veins", "lung vessels", "superior vena cava", "inferior vena cava", "brachiocephalic veins",
    "vertebrae", "intervertebral discs", "right ribs", "left ribs", "costal cartilages", "sternum", "right clavicle",
    "left clavicle", "right scapula", "left scapula", "right humerus", "left humerus", "stomach gas",
    "right pectoral muscle", "left pectoral muscle",
)  # fmt: skip

ORGAN = {name: number for number, name in enumerate(ORGANS)}
PART = {name: number for number, name in enumerate(PARTS)}

# The 18 findings, each a bit of `Phantom.bits`: what one finding covers of another is kept.
FINDING_BITS = {
    name: bit
    for bit, name in enumerate((
        "medical material", "arterial wall calcification", "cardiomegaly", "pericardial effusion",
        "coronary artery wall calcification", "hiatal hernia", "lymphadenopathy", "emphysema", "atelectasis",
        "lung nodule", "lung opacity", "pulmonary fibrotic sequela", "pleural effusion", "mosaic attenuation pattern",
        "peribronchial thickening", "consolidation", "bronchiectasis", "interlobular septal thickening",
    ))
}  # fmt: skip
BIT_OF_ORGAN = {ORGAN[name]: bit for name, bit in FINDING_BITS.items()}
