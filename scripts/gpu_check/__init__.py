"""`bash scripts/gpu_check.sh`: does everything hold on this GPU?"""
