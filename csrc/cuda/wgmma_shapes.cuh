// wgmma's 32 widths as macros, because assembly counts its operands by number: the accumulator's registers come first.
// KX_WGMMA_SHAPES(X) is X(n, o0, …, o6) for n = 8, 16, …, 256, where o0 is the number of the first operand after them.
#pragma once

// clang-format off
#define KX_REGISTER(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])

#define KX_NAMES_8 "%0, %1, %2, %3"
#define KX_REGISTERS_8(d) KX_REGISTER(d, 0)
#define KX_NAMES_16 KX_NAMES_8 ", %4, %5, %6, %7"
#define KX_REGISTERS_16(d) KX_REGISTERS_8(d), KX_REGISTER(d, 4)
#define KX_NAMES_24 KX_NAMES_16 ", %8, %9, %10, %11"
#define KX_REGISTERS_24(d) KX_REGISTERS_16(d), KX_REGISTER(d, 8)
#define KX_NAMES_32 KX_NAMES_24 ", %12, %13, %14, %15"
#define KX_REGISTERS_32(d) KX_REGISTERS_24(d), KX_REGISTER(d, 12)
#define KX_NAMES_40 KX_NAMES_32 ", %16, %17, %18, %19"
#define KX_REGISTERS_40(d) KX_REGISTERS_32(d), KX_REGISTER(d, 16)
#define KX_NAMES_48 KX_NAMES_40 ", %20, %21, %22, %23"
#define KX_REGISTERS_48(d) KX_REGISTERS_40(d), KX_REGISTER(d, 20)
#define KX_NAMES_56 KX_NAMES_48 ", %24, %25, %26, %27"
#define KX_REGISTERS_56(d) KX_REGISTERS_48(d), KX_REGISTER(d, 24)
#define KX_NAMES_64 KX_NAMES_56 ", %28, %29, %30, %31"
#define KX_REGISTERS_64(d) KX_REGISTERS_56(d), KX_REGISTER(d, 28)
#define KX_NAMES_72 KX_NAMES_64 ", %32, %33, %34, %35"
#define KX_REGISTERS_72(d) KX_REGISTERS_64(d), KX_REGISTER(d, 32)
#define KX_NAMES_80 KX_NAMES_72 ", %36, %37, %38, %39"
#define KX_REGISTERS_80(d) KX_REGISTERS_72(d), KX_REGISTER(d, 36)
#define KX_NAMES_88 KX_NAMES_80 ", %40, %41, %42, %43"
#define KX_REGISTERS_88(d) KX_REGISTERS_80(d), KX_REGISTER(d, 40)
#define KX_NAMES_96 KX_NAMES_88 ", %44, %45, %46, %47"
#define KX_REGISTERS_96(d) KX_REGISTERS_88(d), KX_REGISTER(d, 44)
#define KX_NAMES_104 KX_NAMES_96 ", %48, %49, %50, %51"
#define KX_REGISTERS_104(d) KX_REGISTERS_96(d), KX_REGISTER(d, 48)
#define KX_NAMES_112 KX_NAMES_104 ", %52, %53, %54, %55"
#define KX_REGISTERS_112(d) KX_REGISTERS_104(d), KX_REGISTER(d, 52)
#define KX_NAMES_120 KX_NAMES_112 ", %56, %57, %58, %59"
#define KX_REGISTERS_120(d) KX_REGISTERS_112(d), KX_REGISTER(d, 56)
#define KX_NAMES_128 KX_NAMES_120 ", %60, %61, %62, %63"
#define KX_REGISTERS_128(d) KX_REGISTERS_120(d), KX_REGISTER(d, 60)
#define KX_NAMES_136 KX_NAMES_128 ", %64, %65, %66, %67"
#define KX_REGISTERS_136(d) KX_REGISTERS_128(d), KX_REGISTER(d, 64)
#define KX_NAMES_144 KX_NAMES_136 ", %68, %69, %70, %71"
#define KX_REGISTERS_144(d) KX_REGISTERS_136(d), KX_REGISTER(d, 68)
#define KX_NAMES_152 KX_NAMES_144 ", %72, %73, %74, %75"
#define KX_REGISTERS_152(d) KX_REGISTERS_144(d), KX_REGISTER(d, 72)
#define KX_NAMES_160 KX_NAMES_152 ", %76, %77, %78, %79"
#define KX_REGISTERS_160(d) KX_REGISTERS_152(d), KX_REGISTER(d, 76)
#define KX_NAMES_168 KX_NAMES_160 ", %80, %81, %82, %83"
#define KX_REGISTERS_168(d) KX_REGISTERS_160(d), KX_REGISTER(d, 80)
#define KX_NAMES_176 KX_NAMES_168 ", %84, %85, %86, %87"
#define KX_REGISTERS_176(d) KX_REGISTERS_168(d), KX_REGISTER(d, 84)
#define KX_NAMES_184 KX_NAMES_176 ", %88, %89, %90, %91"
#define KX_REGISTERS_184(d) KX_REGISTERS_176(d), KX_REGISTER(d, 88)
#define KX_NAMES_192 KX_NAMES_184 ", %92, %93, %94, %95"
#define KX_REGISTERS_192(d) KX_REGISTERS_184(d), KX_REGISTER(d, 92)
#define KX_NAMES_200 KX_NAMES_192 ", %96, %97, %98, %99"
#define KX_REGISTERS_200(d) KX_REGISTERS_192(d), KX_REGISTER(d, 96)
#define KX_NAMES_208 KX_NAMES_200 ", %100, %101, %102, %103"
#define KX_REGISTERS_208(d) KX_REGISTERS_200(d), KX_REGISTER(d, 100)
#define KX_NAMES_216 KX_NAMES_208 ", %104, %105, %106, %107"
#define KX_REGISTERS_216(d) KX_REGISTERS_208(d), KX_REGISTER(d, 104)
#define KX_NAMES_224 KX_NAMES_216 ", %108, %109, %110, %111"
#define KX_REGISTERS_224(d) KX_REGISTERS_216(d), KX_REGISTER(d, 108)
#define KX_NAMES_232 KX_NAMES_224 ", %112, %113, %114, %115"
#define KX_REGISTERS_232(d) KX_REGISTERS_224(d), KX_REGISTER(d, 112)
#define KX_NAMES_240 KX_NAMES_232 ", %116, %117, %118, %119"
#define KX_REGISTERS_240(d) KX_REGISTERS_232(d), KX_REGISTER(d, 116)
#define KX_NAMES_248 KX_NAMES_240 ", %120, %121, %122, %123"
#define KX_REGISTERS_248(d) KX_REGISTERS_240(d), KX_REGISTER(d, 120)
#define KX_NAMES_256 KX_NAMES_248 ", %124, %125, %126, %127"
#define KX_REGISTERS_256(d) KX_REGISTERS_248(d), KX_REGISTER(d, 124)

#define KX_WGMMA_SHAPES(X) \
  X(8, 4, 5, 6, 7, 8, 9, 10) \
  X(16, 8, 9, 10, 11, 12, 13, 14) \
  X(24, 12, 13, 14, 15, 16, 17, 18) \
  X(32, 16, 17, 18, 19, 20, 21, 22) \
  X(40, 20, 21, 22, 23, 24, 25, 26) \
  X(48, 24, 25, 26, 27, 28, 29, 30) \
  X(56, 28, 29, 30, 31, 32, 33, 34) \
  X(64, 32, 33, 34, 35, 36, 37, 38) \
  X(72, 36, 37, 38, 39, 40, 41, 42) \
  X(80, 40, 41, 42, 43, 44, 45, 46) \
  X(88, 44, 45, 46, 47, 48, 49, 50) \
  X(96, 48, 49, 50, 51, 52, 53, 54) \
  X(104, 52, 53, 54, 55, 56, 57, 58) \
  X(112, 56, 57, 58, 59, 60, 61, 62) \
  X(120, 60, 61, 62, 63, 64, 65, 66) \
  X(128, 64, 65, 66, 67, 68, 69, 70) \
  X(136, 68, 69, 70, 71, 72, 73, 74) \
  X(144, 72, 73, 74, 75, 76, 77, 78) \
  X(152, 76, 77, 78, 79, 80, 81, 82) \
  X(160, 80, 81, 82, 83, 84, 85, 86) \
  X(168, 84, 85, 86, 87, 88, 89, 90) \
  X(176, 88, 89, 90, 91, 92, 93, 94) \
  X(184, 92, 93, 94, 95, 96, 97, 98) \
  X(192, 96, 97, 98, 99, 100, 101, 102) \
  X(200, 100, 101, 102, 103, 104, 105, 106) \
  X(208, 104, 105, 106, 107, 108, 109, 110) \
  X(216, 108, 109, 110, 111, 112, 113, 114) \
  X(224, 112, 113, 114, 115, 116, 117, 118) \
  X(232, 116, 117, 118, 119, 120, 121, 122) \
  X(240, 120, 121, 122, 123, 124, 125, 126) \
  X(248, 124, 125, 126, 127, 128, 129, 130) \
  X(256, 128, 129, 130, 131, 132, 133, 134)
// clang-format on
