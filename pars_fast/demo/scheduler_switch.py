"""The name of the variable that tells the demo's scheduler where to read its policy; imports no vLLM."""

POLICY_FILE_VARIABLE = "PARS_DEMO_POLICY_FILE"
