"""Names of the files in a result folder, for those who write them and those who read them."""

MANIFEST, FAILURE = "manifest.json", "failed.json"
VIDEO, CONTACT_SHEET, TRACE = "video.mp4", "contact_sheet.png", "trace.json"
LATENTS = "latents.safetensors"
PICTURES, REPORT = "pictures.zip", "report.html"
