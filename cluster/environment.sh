# What every shell and every Ray process of a node needs; sourced by ~/.bashrc and by the start commands.
# The values are those of mmsweep/cluster.py: Ray reads them when a node starts, too early for a launch.
export RAY_AUTH_MODE=token  # no token, no job; the token is in ~/.ray/auth_token
export RAY_USAGE_STATS_ENABLED=0
export RAY_CHDIR_TO_TRIAL_DIR=0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export TUNE_DISABLE_AUTO_CALLBACK_LOGGERS=1
export TUNE_MAX_PENDING_TRIALS_PG=100000
export TUNE_PRINT_ALL_TRIAL_ERRORS=0
export TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S=1e9
export TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER=1e9
export RAY_AIR_NEW_OUTPUT=0
export RAY_worker_niceness=0
export PATH="$HOME/mmsweep/.venv/bin:$PATH"
# The endpoint of a store that is not AWS's own, where the cluster file or you have named one.
if [ -r "$HOME/store.sh" ]; then . "$HOME/store.sh"; fi
# The chat room of detached launches, on the head alone; see the README.
if [ -r "$HOME/webhook.sh" ]; then . "$HOME/webhook.sh"; fi
