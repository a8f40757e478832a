# The CUDA backend: libchainfed_cuda.so beside `_native`, which opens it when the first CUDA array comes. A library of
# its own, so that `_native` is the same with and without it. And, for the tests, the same sources compiled as C++ for
# the emulator (csrc/cuda/emulator.h).
#   CHAINFED_CUDA               1: required; auto: built when nvcc is there and can compile (what pip does, setup.py);
#                               0 or empty: not built, so that work on the core never waits for nvcc
#   CHAINFED_CUDA_ARCHITECTURES list of 80, 87, ...; 80 or above. The newest is also built as portable code (PTX), which
#                               the driver compiles for devices newer than all of them.
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
if(CHAINFED_CUDA_ARCHITECTURES)
  string(REPLACE "," ";" chainfed_architectures "${CHAINFED_CUDA_ARCHITECTURES}")
else()
  set(chainfed_architectures 80 87 89 90)
endif()
foreach(architecture IN LISTS chainfed_architectures)
  if(NOT architecture MATCHES "^[0-9]+$" OR architecture LESS 80)
    message(FATAL_ERROR "CHAINFED_CUDA_ARCHITECTURES: expected numbers of 80 or above, such as 87, got ${architecture}")
  endif()
endforeach()
list(SORT chainfed_architectures COMPARE NATURAL)

# Sets CHAINFED_NVCC when there is a compiler that turns an empty kernel into code for the wanted architectures.
function(find_nvcc)
  find_program(CHAINFED_NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin
               PATHS /usr/local/cuda/bin)
  if(NOT CHAINFED_NVCC)
    set(CHAINFED_CUDA_PROBLEM "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda" PARENT_SCOPE)
    return()
  endif()
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/cuda_probe.cu")
  file(WRITE "${probe}" "__global__ void probe() {}\n")
  foreach(architecture IN LISTS chainfed_architectures)
    list(APPEND code "-gencode=arch=compute_${architecture},code=sm_${architecture}")
  endforeach()
  execute_process(COMMAND "${CHAINFED_NVCC}" -std=c++17 ${code} -c "${probe}" -o "${probe}.o"
                  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    string(STRIP "${output}" output)
    set(CHAINFED_CUDA_PROBLEM "${CHAINFED_NVCC} fails: ${output}" PARENT_SCOPE)
  endif()
endfunction()

if("${CHAINFED_CUDA}" MATCHES "^0?$" OR CHAINFED_SANITIZE OR (CMAKE_CROSSCOMPILING AND "${CHAINFED_CUDA}" STREQUAL "auto"))
  set(chainfed_build_cuda OFF)
elseif("${CHAINFED_CUDA}" MATCHES "^(1|auto)$")
  find_nvcc()
  if(NOT CHAINFED_CUDA_PROBLEM)
    set(chainfed_build_cuda ON)
  elseif("${CHAINFED_CUDA}" STREQUAL "1")
    message(FATAL_ERROR "CHAINFED_CUDA=1: ${CHAINFED_CUDA_PROBLEM}. Install the CUDA toolkit (on a Jetson: "
                        "apt-get install cuda-toolkit, part of JetPack), or leave out architectures that it does not "
                        "know with CHAINFED_CUDA_ARCHITECTURES, or build for the CPU alone with CHAINFED_CUDA=0")
  else()
    set(chainfed_build_cuda OFF)
    message(STATUS "CUDA backend: not built (${CHAINFED_CUDA_PROBLEM})")
  endif()
else()
  message(FATAL_ERROR "CHAINFED_CUDA: expected 0, 1 or auto, got ${CHAINFED_CUDA}")
endif()

add_custom_target(chainfed_module)
if(chainfed_build_cuda)
  set(CMAKE_CUDA_COMPILER "${CHAINFED_NVCC}")
  set(CMAKE_CUDA_ARCHITECTURES "")
  foreach(architecture IN LISTS chainfed_architectures)
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${architecture}-real")
  endforeach()
  list(GET chainfed_architectures -1 newest)
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
  enable_language(CUDA)
  list(JOIN chainfed_architectures "," architecture_text)
  message(STATUS "CUDA backend: ${CMAKE_CUDA_COMPILER_VERSION} for ${architecture_text}")
  add_library(chainfed_cuda SHARED ${cuda_sources} csrc/cuda/architectures.cpp)
  target_include_directories(chainfed_cuda PRIVATE csrc/include csrc)
  target_compile_features(chainfed_cuda PRIVATE cuda_std_17)
  target_compile_definitions(chainfed_cuda PRIVATE "CHAINFED_CUDA_ARCHITECTURES=\"${architecture_text}\"")
  set_target_properties(chainfed_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CHAINFED_MODULE_DIR}"
                        CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  target_link_libraries(chainfed_cuda PRIVATE ${CMAKE_DL_LIBS} Threads::Threads)
  target_link_options(chainfed_cuda PRIVATE -Wl,--exclude-libs,ALL)
  add_dependencies(chainfed_module chainfed_cuda)
endif()

# The device code, and runtime.cu and library_product.cu too: over a CUDA runtime and a cuBLASLt of the tests' own.
if(CHAINFED_TESTS)
  add_library(chainfed_fake_cublaslt SHARED tests/csrc/fake_cuda/cublaslt.cpp)
  target_include_directories(chainfed_fake_cublaslt PRIVATE csrc)
  target_link_libraries(chainfed_fake_cublaslt PRIVATE chainfed_options)
  set_target_properties(chainfed_fake_cublaslt PROPERTIES CXX_VISIBILITY_PRESET default)
  set(emulated_sources csrc/cuda/emulator.cpp csrc/cuda/architectures.cpp tests/csrc/fake_cuda/runtime.cpp)
  foreach(source IN LISTS cuda_sources)
    get_filename_component(name "${source}" NAME_WE)
    set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/emulated/${name}.cpp")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"cuda/${name}.cu\"\n")
    list(APPEND emulated_sources "${wrapper}")
  endforeach()
  add_library(chainfed_cuda_emulator STATIC ${emulated_sources})
  target_include_directories(chainfed_cuda_emulator PUBLIC csrc/include csrc)
  target_include_directories(chainfed_cuda_emulator BEFORE PRIVATE tests/csrc/fake_cuda)
  target_compile_definitions(chainfed_cuda_emulator PRIVATE CHAINFED_CUDA_ARCHITECTURES="80,87,89,90"
                             CHAINFED_CUBLASLT="$<TARGET_FILE:chainfed_fake_cublaslt>")
  target_compile_options(chainfed_cuda_emulator PRIVATE -ffp-contract=off)
  target_link_libraries(chainfed_cuda_emulator PUBLIC chainfed_options ${CMAKE_DL_LIBS})
  add_dependencies(chainfed_cuda_emulator chainfed_fake_cublaslt)
  # For the Python tests: what `_native` opens in place of the CUDA library.
  add_library(chainfed_cuda_emulated SHARED csrc/cuda/emulated_module.cpp)
  target_link_libraries(chainfed_cuda_emulated PRIVATE -Wl,--whole-archive chainfed_cuda_emulator
                        -Wl,--no-whole-archive)
endif()
