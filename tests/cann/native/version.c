/* The CANN version. torch_npu and torchair take different paths by it; "" means "very old". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *version(void) {
  const char *value = getenv("CANNSIM_VERSION");
  return value ? value : "9.1.0";
}

struct package_version {
  char version[128], major[64], minor[64], release[64], patch[64], reserved[128];
};

int aclsysGetCANNVersion(int package, struct package_version *out) {
  (void)package;
  memset(out, 0, sizeof *out);
  snprintf(out->version, sizeof out->version, "%s", version());
  return 0;
}

int aclsysGetVersionStr(char *package, char *out) {
  (void)package;
  strcpy(out, version());
  return 0;
}
