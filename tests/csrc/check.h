// The whole test harness: CHECK prints and counts, TEST registers, main runs all tests, or those whose name contains
// one of its arguments, and returns the number of failures (at most 125). CHECK_THROWS names the exception class.
#pragma once
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};
inline void fail(const char* file, int line, const char* text) {
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
  ++failures();
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name{#name, name}; \
  static void name()

#define CHECK(condition)                                           \
  do {                                                             \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
  } while (false)

// For loops over shapes: prints the text (printf style) with the failure.
#define CHECK_IN(condition, ...)                   \
  do {                                             \
    if (!(condition)) {                            \
      check::fail(__FILE__, __LINE__, #condition); \
      std::fprintf(stderr, "  in ");               \
      std::fprintf(stderr, __VA_ARGS__);           \
      std::fprintf(stderr, "\n");                  \
    }                                              \
  } while (false)

#define CHECK_THROWS(Exception, statement)                                          \
  do {                                                                              \
    bool thrown = false;                                                            \
    try {                                                                           \
      statement;                                                                    \
    } catch (const Exception&) {                                                    \
      thrown = true;                                                                \
    }                                                                               \
    if (!thrown) check::fail(__FILE__, __LINE__, #statement " throws " #Exception); \
  } while (false)

int main(int argc, char** argv) {
  int num_run = 0;
  for (const check::Test& test : check::tests()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strstr(test.name, argv[i]) != nullptr;
    if (!wanted) continue;
    ++num_run;
    const int before = check::failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      check::fail(__FILE__, __LINE__, error.what());
    }
    std::printf("%s %s\n", check::failures() == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  if (num_run == 0) check::fail(__FILE__, __LINE__, "some test has a name that contains an argument");
  return check::failures() < 125 ? check::failures() : 125;
}
